"""JSON that somebody else wrote: parsed, with every fault told in a few words.

In: text or bytes. Out: plain values, or ValueError. Knows nothing about what they mean.
"""

import dataclasses
import json
import re
from typing import Any

MAX_REASON = 200  # characters; a decoder's error may quote the whole file
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_json(text: str | bytes) -> Any:
    """What `json.loads` gives.

    Raises:
        ValueError: not JSON, not UTF-8 (as half of a surrogate pair is not), or nested too deeply.
    """
    try:
        parsed = json.loads(text)
        if SURROGATE.search(text if isinstance(text, bytes) else text.encode()):
            json.dumps(parsed, ensure_ascii=False).encode()  # halves that found each other can
        return parsed
    except RecursionError:
        raise ValueError("nested too deeply") from None


def require_keys(document: dict[str, Any], record: Any) -> None:
    """ValueError where a document has a key that the dataclass `record` has no field for."""
    known = {field.name for field in dataclasses.fields(record)}
    foreign = next((key for key in document if key not in known), None)
    if foreign is not None:
        raise ValueError(f"it has {foreign!r}, which means nothing here")


def reason(error: BaseException) -> str:
    """An error of a parser as part of one line."""
    text = f"it has no {error.args[0]}" if isinstance(error, KeyError) and error.args else ""
    text = " ".join((text or str(error)).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 3] + "..."
