"""How a setting is declared."""

from dataclasses import field
from typing import Any


def setting(default: Any, doc: str, *, low: float | None = None, high: float | None = None, choices: tuple = ()) -> Any:
    """A dataclass field with its documentation and its range; ``low`` and ``high`` are inclusive."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "choices": choices})
