"""Outlines and run lengths of objects as COCO writes them: checked, kept compactly, and drawn when they are wanted."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_AT_ONCE = 10_000  # polygons whose corners are looked at in one piece: some megabytes
_BEYOND = 0.5  # pixels past the image that leave a disk of radius 1 at least a pixel in it


def pack(segmentation: Any, size: tuple[int, int]) -> tuple[bytes, int] | None:
    """A segmentation as bytes, and how many of its polygons were left out for having fewer than three corners.

    COCO's loaders take a polygon of four numbers for a box; it is none.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], or run lengths {"size": [height, width], "counts": ...} with
            counts as numbers or as COCO's string.
        size: (height, width) of the image.

    Returns:
        None if there is nothing to draw.

    Raises:
        ValueError: what is wrong with it.
    """
    if isinstance(segmentation, Mapping):
        return _pack_runs(segmentation, size), 0
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str):
        raise ValueError(f"a segmentation is a list of polygons or run lengths, not {_shown(segmentation)}")
    rings = []
    for polygon in segmentation:
        try:
            ring = array("d", polygon)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"a polygon is a list of numbers, not {_shown(polygon)}") from error
        if len(ring) % 2:
            raise ValueError(f"a polygon of {len(ring)} numbers: x and y come in pairs")
        if not all(map(math.isfinite, ring)):
            raise ValueError("a polygon has a coordinate that is not finite")
        if len(ring) >= 6:
            rings.append(ring)
    if not rings:
        return None
    packed = array("d", [len(rings), *map(len, rings)])
    for ring in rings:
        packed += ring
    # run lengths are ASCII, so a leading NUL tells them apart
    return b"\0" + packed.tobytes(), len(segmentation) - len(rings)


def unpack(packed: bytes, size: tuple[int, int]) -> Any:
    """The segmentation in COCO's form: polygons, or run lengths with counts as a string."""
    if packed[:1] != b"\0":
        return {"size": list(size), "counts": packed.decode("ascii")}
    numbers = np.frombuffer(packed, np.float64, offset=1)
    count = int(numbers[0])
    ends = np.cumsum(numbers[1 : 1 + count].astype(int))[:-1]
    return [ring.tolist() for ring in np.split(numbers[1 + count :], ends)]


def draw(packed: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """The mask (height, width), 1 inside; the very pixels that COCO's own API sets.

    Raises:
        ValueError: run lengths that do not fill the image.
    """
    from faster_coco_eval.core.mask import decode

    return np.asarray(decode(_runs(packed, size)))


def empty(packed: Sequence[bytes], sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """(N,) which of the masks on images of `sizes` (N, 2) have no pixel; only the doubtful ones are drawn for it.

    Run lengths that cannot be read count as masks: whoever draws them says what is wrong.
    """
    plump = np.zeros(len(packed), bool)
    outlines = np.array([row for row, one in enumerate(packed) if one[:1] == b"\0"], np.int64)
    for start in range(0, len(outlines), _AT_ONCE):
        rows = outlines[start : start + _AT_ONCE]
        plump[rows] = _plump([packed[row] for row in rows], sizes[rows])
    found = np.zeros(len(packed), bool)
    for row in np.flatnonzero(~plump).tolist():
        height, width = sizes[row].tolist()
        try:
            found[row] = not area(packed[row], (height, width))
        except (ValueError, RuntimeError):
            continue
    return found


def _plump(outlines: list[bytes], sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which polygons lie inside their image and are thick enough that a pixel must be in them, by their first ring.

    What has more area than circumference holds a disk of radius 1 (area <= circumference * inradius).
    """
    numbers = np.frombuffer(b"".join(one[1:] for one in outlines), np.float64)
    lengths = np.array([len(one) // numbers.itemsize for one in outlines])
    starts = np.cumsum(lengths) - lengths
    rings, corners = numbers[starts].astype(int), numbers[starts + 1].astype(int) // 2
    stops = np.cumsum(corners)
    begins = stops - corners
    owner, corner = np.repeat(np.arange(len(outlines)), corners), np.arange(stops[-1])
    place = (starts + 1 + rings)[owner] + 2 * (corner - begins[owner])
    x, y = numbers[place], numbers[place + 1]
    following = np.where(corner + 1 == stops[owner], begins[owner], corner + 1)
    area = np.abs(np.add.reduceat(x * y[following] - x[following] * y, begins)) / 2
    circumference = np.add.reduceat(np.hypot(x[following] - x, y[following] - y), begins)
    height, width = sizes.T
    inside = np.minimum.reduceat(np.minimum(x, y), begins) >= -_BEYOND
    inside &= np.maximum.reduceat(x, begins) <= width + _BEYOND
    inside &= np.maximum.reduceat(y, begins) <= height + _BEYOND
    return inside & (area > circumference)


def area(packed: bytes, size: tuple[int, int]) -> float:
    """The number of pixels in the mask."""
    from faster_coco_eval.core import mask

    return float(mask.area(_runs(packed, size)))


def bounds(packed: bytes, size: tuple[int, int]) -> list[float]:
    """The box (x, y, width, height) around the mask's pixels or the polygons' corners."""
    if packed[:1] == b"\0":
        corners = np.concatenate([np.reshape(ring, (-1, 2)) for ring in unpack(packed, size)])
        low, high = corners.min(0), corners.max(0)
        return [*low.tolist(), *(high - low).tolist()]
    from faster_coco_eval.core.mask import toBbox

    return [float(value) for value in np.ravel(toBbox(_runs(packed, size)))]


def _runs(packed: bytes, size: tuple[int, int]) -> dict[str, Any]:
    from faster_coco_eval.core.mask import segmToRle

    segmentation = unpack(packed, size)
    return segmentation if isinstance(segmentation, dict) else segmToRle(segmentation, size[1], size[0])


def _pack_runs(segmentation: Mapping[str, Any], size: tuple[int, int]) -> bytes:
    if "counts" not in segmentation or "size" not in segmentation:
        raise ValueError("run lengths have a size and counts")
    stored, counts = segmentation["size"], segmentation["counts"]
    if not isinstance(stored, Sequence) or list(stored) != list(size):
        raise ValueError(f"its mask is {_shown(stored)} (height, width), but the image is {list(size)}")
    try:
        if isinstance(counts, (str, bytes)):
            return counts.encode("ascii") if isinstance(counts, str) else counts
        runs = [int(run) for run in counts]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError("the counts of run lengths are a list of whole numbers or a string") from error
    if min(runs, default=0) < 0:
        raise ValueError(f"one of its run lengths is negative: {min(runs)}")
    if sum(runs) != size[0] * size[1]:
        raise ValueError(f"its run lengths cover {sum(runs)} pixels, but the image has {size[0] * size[1]}")
    from faster_coco_eval.core.mask import frPyObjects

    packed = frPyObjects({"size": list(size), "counts": runs}, *size)["counts"]
    return packed.encode("ascii") if isinstance(packed, str) else packed


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
