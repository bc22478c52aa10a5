"""A GGUF's header, read with the `gguf` package, and one clear error for every way it can be wrong.

In: a file. Out: gguf's reader and the values of all keys. Reads no tensor.
"""

import struct
from pathlib import Path
from typing import Any

from mone_edge.documents import reason
from mone_edge.errors import MoneEdgeError

FAULTS = (
    ValueError,
    KeyError,
    IndexError,
    OverflowError,
    MemoryError,
    TypeError,
    AttributeError,
    struct.error,
)


def read(path: Path) -> tuple[Any, dict[str, Any]]:
    """The reader, and every key's value.

    Raises:
        MoneEdgeError: the file cannot be read, or is not a GGUF that keeps its own promises.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        values = {key: field.contents() for key, field in reader.fields.items()}
    except OSError as error:
        raise MoneEdgeError(f"cannot read {path}: {error.strerror}") from error
    except FAULTS as error:
        raise MoneEdgeError(f"{path} is a damaged GGUF: {reason(error)}") from error
    return reader, values


def array_keys(reader: Any) -> set[str]:
    """Keys whose values are arrays."""
    from gguf import GGUFValueType

    return {k for k, f in reader.fields.items() if f.types[:1] == [GGUFValueType.ARRAY]}
