"""A page of settings as a tree of dataclasses: values from a YAML file and ``a.b=c`` words, names and ranges checked, described.

Knows no setting: the dataclasses say what there is, each field by ``setting()``.
"""

import dataclasses
import difflib
import math
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from haste_dist.errors import ConfigError
from haste_dist.setting import range_text

Page = TypeVar("Page")
Layer = tuple[str, DictConfig]  # where values come from, and they


def file_layer(path: Path, where: str) -> Layer:
    """The values of a YAML file. Raises ConfigError."""
    return where, _read_yaml(path)


def word_layers(words: list[str]) -> list[Layer]:
    """Those of ``a.b=c`` words. Raises ConfigError."""
    layers = []
    for word in words:
        key, sep, value = word.partition("=")
        if not sep or not key.strip():
            raise ConfigError(f"'{word}': a setting on the command line reads part.name=value")
        try:
            # `a.b=` is an empty string (a shell eats the quotes of a.b=''), not YAML's null
            layers.append((word, OmegaConf.from_dotlist([word if value else f"{word}''"])))
        except Exception as error:  # a YAML scanner error from the value
            raise ConfigError(f"'{word}': {first_line_of_yaml(error)}") from None
    return layers


def merged(schema: type[Page], layers: list[Layer]) -> Page:
    """The defaults of ``schema`` under the layers, later ones winning. Raises ConfigError for an unknown name or a wrong type."""
    page = OmegaConf.structured(schema)
    for where, layer in layers:
        try:
            _check_names(layer, schema, schema, where)
            page = OmegaConf.merge(page, layer)
        except OmegaConfBaseException as error:
            key = error.full_key or ""
            raise ConfigError(": ".join(p for p in (where, "" if where.startswith(key) else key, first_line_of_yaml(error)) if p)) from None
    try:
        made = OmegaConf.to_object(page)
    except OmegaConfBaseException as error:  # an interpolation such as ${oc.env:NAME} that leads nowhere
        raise ConfigError(f"{error.full_key}: {first_line_of_yaml(error)}") from None
    assert isinstance(made, schema)
    return made


def as_yaml(page: Any) -> str:
    """YAML that reads back to the same page."""
    return OmegaConf.to_yaml(OmegaConf.structured(page))


def describe(page: Any) -> str:
    """The resolved page as YAML with each field's documentation and range behind it."""
    lines = []
    for part in dataclasses.fields(page):
        lines.append(f"{part.name}:")
        section = getattr(page, part.name)
        for f in dataclasses.fields(section):
            lines.append(f"  {_inline(f.name, getattr(section, f.name)):<34} # {f.metadata['doc']}{range_text(f.metadata)}")
    return "\n".join(lines) + "\n"


def _inline(name: str, value: Any) -> str:
    """``name: value`` as YAML on one line."""
    if isinstance(value, list):
        return f"{name}: {value}"
    return re.sub(r"\n *", " ", OmegaConf.to_yaml(OmegaConf.create({name: value})).rstrip("\n"))  # long strings come folded


def check_ranges(page: Any) -> None:
    """Every field of every part lies within its range. Raises ConfigError."""
    for part in dataclasses.fields(page):
        _check_part(part.name, getattr(page, part.name))


def _check_part(part: str, section: Any) -> None:
    for f in dataclasses.fields(section):
        value, meta = getattr(section, f.name), f.metadata
        if value is None:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{part}.{f.name}={value}: must be a finite number")
        outside = (meta.get("low") is not None and value < meta["low"]) or (meta.get("high") is not None and value > meta["high"])
        if outside or (meta.get("choices") and value not in meta["choices"]):
            raise ConfigError(f"{part}.{f.name}={value}: must be in{range_text(meta)} ({meta['doc']})")


def _check_names(layer: DictConfig | ListConfig, schema: Any, root: Any, where: str, prefix: str = "") -> None:
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{where}: expected 'part: {{name: value}}' at {prefix or 'the top'}")
    known = {f.name: f.type for f in dataclasses.fields(schema)}
    for key in layer:
        name = prefix + str(key)
        if OmegaConf.is_missing(layer, key):
            raise ConfigError(f"{where}: {name} has no value")
        if key not in known:
            every = [f"{p.name}.{f.name}" for p in dataclasses.fields(root) for f in dataclasses.fields(p.type)]  # type: ignore[arg-type]
            near = difflib.get_close_matches(name, every + [p.name for p in dataclasses.fields(root)], n=1, cutoff=0.0)
            raise ConfigError(f"{where}: unknown setting '{name}'; did you mean '{near[0]}'?")
        if dataclasses.is_dataclass(known[key]):
            _check_names(layer[key], known[key], root, where, f"{key}.")


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except Exception as error:  # unreadable, not UTF-8, or not YAML
        raise ConfigError(f"{path}: {first_line_of_yaml(error)}") from None
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path}: expected 'part: {{name: value}}' at the top")
    return loaded


def first_line_of_yaml(error: Exception) -> str:
    """What went wrong and where in the file, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]
