"""Checks of single values of an input row. Each returns the clean value or raises BadValue(reason, detail).

``reason`` is one of a few fixed words, so that bad rows can be counted by it; ``detail`` is for a person.
"""

import json
from typing import Any

MAX_LABELS = 2**31 - 1  # label ids are stored as int32


class BadValue(Exception):
    """What is wrong with a value."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


def utf8(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadValue("invalid UTF-8", f"not valid UTF-8 at byte {error.start + 1} of the line") from None


def json_object(raw: bytes) -> dict[str, Any]:
    line = utf8(raw)
    try:
        page = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadValue("invalid JSON", f"not valid JSON ({error.msg} at character {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or endless brackets
        raise BadValue("invalid JSON", f"not valid JSON ({error})") from None
    if not isinstance(page, dict):
        raise BadValue("invalid JSON", "not a JSON object")
    return page


def required(page: dict[str, Any], name: str) -> Any:
    if page.get(name) is None:
        raise BadValue("missing field", f"no field '{name}'")
    return page[name]


def text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadValue("wrong type", f"'{name}' is {type(value).__name__}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
            raise BadValue("invalid UTF-8", f"'{name}' holds half of a surrogate pair, which UTF-8 cannot hold") from None
    return value


def uid(value: Any) -> str:
    return str(value) if type(value) is int else text(value, "uid")


def filled(value: str) -> str:
    if not value:
        raise BadValue("empty text", "the text is empty")
    return value


def label_ids(values: Any, labels: int | None) -> list[int]:
    """Label ids, ascending and distinct, each in [0, ``labels``) (None: below MAX_LABELS)."""
    if not isinstance(values, list):
        raise BadValue("label not an integer", f"the labels are {type(values).__name__}, not a list of label ids")
    limit = MAX_LABELS if labels is None else labels
    for value in values:
        if type(value) is not int:  # True and 3.0 are no label ids
            raise BadValue("label not an integer", f"label {json.dumps(value, default=str)[:40]} is not an integer")
        if not 0 <= value < limit:
            bound = f"ids run from 0 to {MAX_LABELS - 1}" if labels is None else f"the label file has {labels} labels"
            raise BadValue("label out of range", f"label {value} is out of range ({bound})")
    return sorted(set(values))


def label_words(line: str) -> list[int]:
    """Label ids of a line: "3 17", "3,17", or the sparse form "3:1.0 17:0.5", where a value of 0 means that it is not one."""
    values = []
    for word in line.replace(",", " ").split():
        label, sep, value = word.partition(":")
        try:
            if sep and float(value) == 0:
                continue
        except ValueError:
            raise BadValue("label not an integer", f"label '{word[:40]}' is not 'id' or 'id:value'") from None
        values.append(integer(label, "label"))
    return values


def integer(word: str, name: str) -> int:
    if not (word.isascii() and word.removeprefix("-").isdigit() and len(word) < 20):
        raise BadValue("label not an integer", f"{name} '{word[:40]}' is not an integer")
    return int(word)
