"""What constructors take: one check for each kind of argument. Every error is one line with the name and the value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

POOLINGS = ("avg", "max", "avgmax", "catavgmax", "")

Rule = tuple[str, Callable[[Any], bool]]


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


_COUNT: Rule = ("a positive int", lambda value: _whole(value, 1))
_COUNT_OR_ZERO: Rule = ("an int of at least 0", lambda value: _whole(value, 0))
_FACTOR: Rule = ("a number above 0", lambda value: _number(value) and value > 0)
_RATE: Rule = ("a probability of at least 0 and below 1", lambda value: _number(value) and 0 <= value < 1)

_RULES: dict[str, Rule] = {
    **dict.fromkeys(("embed_dim", "in_chans", "num_heads", "head_dim", "num_features", "stem_stride"), _COUNT),
    **dict.fromkeys(("stem_dims", "stem_kernel_size", "first_stride"), _COUNT),
    **dict.fromkeys(("num_classes", "group_width"), _COUNT_OR_ZERO),
    **dict.fromkeys(("mlp_ratio", "expand_ratio", "expansion", "gate_ratio", "qk_ratio", "r_b", "r_v"), _FACTOR),
    "layer_scale": ("a number, or None for none", _number),
    **dict.fromkeys(("drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), _RATE),
}


def check_arguments(**values: Any) -> None:
    """ValueError for a value that no argument of its name may be.

    None passes: whether an argument may be None is for its annotation to say.
    """
    for name, value in values.items():
        if value is not None:
            _check(name, value, [value])


def check_entries(**values: Any) -> None:
    """As ``check_arguments``, of arguments that are one value or a sequence of them."""
    for name, value in values.items():
        _check(name, value, value if isinstance(value, Sequence) and not isinstance(value, str) else [value])


def _check(name: str, value: Any, entries: Sequence[Any]) -> None:
    said, allowed = _RULES[name]
    if not entries or not all(allowed(entry) for entry in entries):
        raise ValueError(f"{name} must be {said}, got {value!r}")


def stage_count(depths: Sequence[int]) -> int:
    """How many stages a model of these ``depths`` has; every stage has a block."""
    if not isinstance(depths, Sequence) or not depths or not all(_whole(depth, 1) for depth in depths):
        raise ValueError(f"depths must be a sequence of positive ints, one for each stage, got {depths!r}")
    return len(depths)


def check_heads(dim: int, num_heads: int, of: str = "channels of its stage") -> None:
    """ValueError unless ``num_heads`` divides ``dim``, the number of ``of``."""
    check_arguments(num_heads=num_heads)
    if dim % num_heads:
        raise ValueError(f"num_heads={num_heads} must divide the {dim} {of}")


def check_stem_stride(stride: int) -> None:
    """ValueError unless ``stride`` is that of a stem made of one or two halvings."""
    if stride not in (2, 4):
        raise ValueError(f"stem_stride must be 2 or 4, got {stride!r}")


def check_pool(global_pool: str | None, poolings: Sequence[str] = POOLINGS) -> None:
    """ValueError unless a head pools in that way; None is none, as ''."""
    if global_pool is not None and global_pool not in poolings:
        raise ValueError(
            f"global_pool must be one of {', '.join(map(repr, poolings))} for this head, got {global_pool!r}"
        )


def by_name(name: str, value: Any, find: Callable[[Any], Any]) -> Any:
    """What timm's ``find`` gives for ``value``, a class or timm's name of one; ValueError for a name that it lacks."""
    try:
        return find(value)
    except (KeyError, AssertionError) as error:
        raise ValueError(f"{name}={value!r} is no name that timm knows: give one, or a class") from error
