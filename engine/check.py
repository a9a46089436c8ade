"""Compares a configuration with the dataclasses of `config.py`: unknown keys, wrong types, values out of range."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from .errors import ConfigError, nearest

T = TypeVar("T")
_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def build(kind: type[T], values: Mapping[str, Any], where: str = "") -> T:
    """`values` as an instance of the dataclass `kind`; keys that are left out take their defaults.

    Args:
        kind: a dataclass of `config.py`.
        values: nested plain mappings, lists and scalars.
        where: dotted prefix of the keys, for the messages.

    Raises:
        ConfigError: an unknown key, a value of another type or outside what the field allows.
    """
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = _hints(cast(type, kind))
    for key in values:
        if key not in fields:
            raise unknown_key(f"{where}{key}", kind, where)
    out = {}
    for key, value in values.items():
        path = f"{where}{key}"
        out[key] = _convert(hints[key], value, path)
        _check_allowed(out[key], fields[key].metadata, path)
    return kind(**out)


def unknown_key(path: str, kind: type, where: str = "", groups: Iterable[str] = ()) -> ConfigError:
    """The error for a `path` that `kind` (at `where`, a dotted prefix) does not have: nearest, and what there is.

    `groups` are names that the command line takes there besides the keys.
    """
    leaf = path[len(where) :].split(".")[0]
    names = list(dict.fromkeys([*(f.name for f in dataclasses.fields(kind)), *groups]))
    close = nearest(leaf, names, count=1)
    elsewhere = [key for key in known_keys(kind) if not where and "." in key and key.split(".")[-1] == leaf]
    if elsewhere:
        close = f" (did you mean {' or '.join(map(repr, elsewhere[:4]))}?)"
    place = f"in {where.rstrip('.')}" if where else "at the top level"
    return ConfigError(f"{path}: no such key {place}{close}; allowed there: {', '.join(names)}")


def known_keys(kind: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of `kind`, groups included."""
    for name, hint in _hints(kind).items():
        yield f"{prefix}{name}"
        if dataclasses.is_dataclass(hint):
            yield from known_keys(hint, f"{prefix}{name}.")  # type: ignore[arg-type]


def locate(kind: type, path: str, groups: Iterable[str] = ()) -> ConfigError | None:
    """The error for the first part of the dotted `path` that `kind` does not know; None if all of it exists.

    `groups` are names that the command line takes besides the keys; the message may suggest them.
    """
    where = ""
    for part in path.split("."):
        hints = _hints(kind)
        if part not in hints:
            return unknown_key(path, kind, where, () if where else groups)
        hint = hints[part]
        if not dataclasses.is_dataclass(hint):
            return None
        kind, where = hint, f"{where}{part}."  # type: ignore[assignment]
    return None


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _convert(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            names = ", ".join(f.name for f in dataclasses.fields(hint))
            raise ConfigError(f"{path}: {value!r} is not a group of keys; set one of {names} as {path}.KEY=...")
        return build(hint, value, f"{path}.")  # type: ignore[arg-type]
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if value is None:
        if type(None) in options:
            return None
        raise ConfigError(f"{path}: null is not allowed; give {_describe(hint)}")
    for option in options:
        if option is not type(None):
            ok, converted = _scalar(option, value, path)
            if ok:
                return converted
    raise ConfigError(f"{path}: {value!r} is not {_describe(hint)}")


def _scalar(option: Any, value: Any, path: str) -> tuple[bool, Any]:
    origin = get_origin(option)
    if option is Any:
        return True, value
    if origin is list:
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False, None
        return True, [_convert(get_args(option)[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        return (True, dict(value)) if isinstance(value, Mapping) else (False, None)
    if option is bool or isinstance(value, bool):
        return option is bool and isinstance(value, bool), value
    if option is float and isinstance(value, (int, float)):
        return True, float(value)
    if option is int and isinstance(value, (int, float)) and float(value).is_integer():
        return True, int(value)
    if option is str and isinstance(value, (str, int, float)):
        return True, str(value)
    return False, None


def _describe(hint: Any) -> str:
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    words = []
    for option in options:
        if option is type(None):
            words.append("null")
        elif get_origin(option) is list:
            words.append(f"a list, each {_describe(get_args(option)[0])}")
        elif get_origin(option) is dict:
            words.append("a group of keys")
        else:
            words.append(_NAMES.get(option, str(option)))
    return " or ".join(words)


def _check_allowed(value: Any, rules: Mapping[str, Any], path: str) -> None:
    for item in value if isinstance(value, list) else [value]:
        if item is None:
            continue
        choices = rules.get("choices")
        if choices and item not in choices:
            close = nearest(str(item), map(str, choices), count=1)
            raise ConfigError(f"{path}: {item!r} is not allowed{close}; allowed: {', '.join(map(str, choices))}")
        low, high = rules.get("low"), rules.get("high")
        if (low is not None and item < low) or (high is not None and item > high):
            span = f"at least {low}" if high is None else f"between {low} and {high}"
            raise ConfigError(f"{path}: {item} is out of range; it must be {span}")
