"""How a setting is declared."""

from dataclasses import field
from typing import Any


def setting(default: Any, doc: str, *, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    """A dataclass field with its documentation and its range; ``low`` and ``high`` are inclusive."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "choices": choices})


def range_text(meta: Any) -> str:
    """The range in a setting's metadata, for a person."""
    if meta.get("choices"):
        return f" [{' | '.join(map(str, meta['choices']))}]"
    low, high = meta.get("low"), meta.get("high")
    if low is None and high is None:
        return ""
    return f" [{'' if low is None else low} .. {'' if high is None else high}]"
