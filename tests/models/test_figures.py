"""Every model of the registry has as many parameters and as much work as was printed of it."""

from __future__ import annotations

from typing import Any

import nearfield
import pytest
from figures import PRINTED
from model_helpers import is_nano, multiply_adds, on_meta

MODELS = [name for name in nearfield.list_models() if not is_nano(name)]
# seconds each: deep, and drawn weight by weight even without memory
LONG = ("large", "base_384", "base_512", "window24")


def printed(figure: str) -> list[Any]:
    """Names of the models of which a figure is printed."""
    names = [name for name, row in PRINTED.items() if getattr(row, figure)]
    return [pytest.param(name, marks=pytest.mark.slow) if any(s in name for s in LONG) else name for name in names]


def decimals(printed: str) -> int:
    return len(printed.partition(".")[2])


def test_every_model_has_a_row_and_every_gap_a_reason() -> None:
    assert PRINTED.keys() == set(MODELS)
    for row in PRINTED.values():
        assert row.source
        assert bool(row.missing) == (row.millions is None or row.gmacs is None)


@pytest.mark.parametrize("name", printed("millions"))
def test_parameters_are_as_many_as_printed(name: str) -> None:
    row = PRINTED[name]
    assert row.millions is not None
    count = sum(p.numel() for p in on_meta(name, num_classes=row.classes).parameters()) / 1e6
    digits = decimals(row.millions)
    # half a unit of the last digit less, and rounding is cutting
    assert f"{count - row.cut * 0.5 * 10**-digits:.{digits}f}" == row.millions


@pytest.mark.parametrize("name", printed("gmacs"))
def test_work_is_as_printed(name: str) -> None:
    row = PRINTED[name]
    assert row.gmacs is not None
    work, digits = multiply_adds(on_meta(name, num_classes=row.classes)), decimals(row.gmacs)
    also = [work[part] for part in row.also]
    counted, figure = (work["products"] + sum(also)) / 1e9, float(row.gmacs)
    if not also:
        assert abs(counted - figure) <= max(0.5 * 10**-digits, 0.01 * figure)
        return
    # what is counted the same way comes out the same, and is nearly all products
    assert f"{counted:.{digits}f}" == row.gmacs
    assert min(also) > 0
    assert sum(also) < 0.05 * work["products"]


@pytest.mark.parametrize("name", [name for name, row in PRINTED.items() if row.also and "maxvit" not in name])
def test_the_rule_for_whole_tables_is_about_tables(name: str) -> None:
    """A query's products with both tables, and not with keys: four times the tokens, four times as many."""
    once, twice = (multiply_adds(on_meta(name, img_size=size))["whole tables"] for size in (256, 512))
    assert twice == 4 * once > 0
