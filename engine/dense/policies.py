"""Augmentation policies by name, and what their options may be: each rule is said once, with the option's name."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..errors import ConfigError, listing, nearest


def choose_policy(
    policies: Mapping[str, Callable[..., Any]],
    name: str,
    options: Mapping[str, Any],
    own: Mapping[str, Any] | None = None,
) -> Any:
    """What the entry of that name makes with the options, and with the arguments `own`, which are no options.

    Raises:
        ConfigError: no such policy, an option it does not take, or a value that is not allowed.
    """
    own = own or {}
    if name not in policies:
        raise ConfigError(f"aug.policy={name}: no such policy{nearest(name, policies)}; allowed: {listing(policies)}")
    if set(options) & set(own):
        raise ConfigError(
            f"aug.kwargs: policy {name}: {' and '.join(own)} are those of the data: "
            + ", ".join(f"data.{key}=" for key in own)
        )
    allowed = {key: one for key, one in inspect.signature(policies[name]).parameters.items() if key not in own}
    if strange := [option for option in options if option not in allowed]:
        raise ConfigError(
            f"aug.kwargs: policy {name} has no option {strange[0]!r}{nearest(str(strange[0]), allowed)}; "
            f"it takes {listing(allowed) or 'none'}"
        )
    needed = [key for key, one in allowed.items() if one.default is inspect.Parameter.empty]
    if missing := [key for key in needed if key not in options]:
        raise ConfigError(f"aug.kwargs: policy {name}: {missing[0]} is missing: set aug.kwargs.{missing[0]}")
    try:
        return policies[name](**own, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"aug.kwargs: policy {name}: {error}") from error


# What a value may be: it is given back as it is used, or a ValueError has the rule.


def number(name: str, value: Any, low: float = 0, high: float = math.inf) -> float:
    """A number in [low, high]."""
    if not _is_number(value) or not low <= value <= high:
        allowed = f"a number, at least {low}" if high == math.inf else f"a number from {low} to {high}"
        raise ValueError(f"{name}={value!r}: {allowed}")
    return float(value)


def switch(name: str, value: Any) -> bool:
    """True or false; a word such as "no" would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: true or false")
    return value


def side(name: str, value: Any, rule: str = "a side in pixels") -> int:
    """A whole number of pixels, at least 1."""
    if not _is_side(value):
        raise ValueError(f"{name}={value!r}: {rule}")
    return int(value)


def sides(name: str, value: Any, rule: str, count: int | None = None) -> list[int]:
    """One or more whole numbers of pixels, or exactly `count`."""
    if not _are(value, _is_side, count):
        raise ValueError(f"{name}={_plain(value)!r}: {rule}")
    return [int(one) for one in value]


def factors(name: str, value: Any) -> tuple[float, float]:
    """The ends of a range of factors."""
    if not _are(value, _is_number, 2) or not 0 < value[0] <= value[1]:
        raise ValueError(f"{name}={_plain(value)!r}: the least and the largest, both above 0")
    return float(value[0]), float(value[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are(value: Any, one: Callable[[Any], bool], count: int | None) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return listed and len(value) > 0 and len(value) == (count or len(value)) and all(map(one, value))


def _plain(value: Any) -> Any:
    """Lists and tuples alike, as a configuration has them."""
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
