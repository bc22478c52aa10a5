"""JSON that somebody else wrote: parsed, with every fault told in a few words.

In: text or bytes. Out: plain values, or ValueError. Knows nothing about what they mean.
"""

import dataclasses
import json
from typing import Any

MAX_REASON = 200  # characters; a decoder's error may quote the whole file


def parse_json(text: str | bytes) -> Any:
    """What `json.loads` gives.

    Raises:
        ValueError: not JSON, not UTF-8, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def is_text(value: object) -> bool:
    """Whether this is a string that UTF-8 can hold; half of a surrogate pair in it, as JSON's
    escapes can write one, is not."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


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
