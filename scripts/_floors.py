"""How fast an attention call can be at best: what a device needs for its bytes, products, exponentials, instructions.

Each term is the time of one resource if nothing else held it up; the floor is the largest. Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
from nearfield.ops.patterns import Axis, Pattern, resolve

__all__ = [
    "DEVICES", "DTYPE_BYTES", "Call", "Device", "Floor", "Work", "backward_floor", "backward_work",
    "forward_floor", "forward_work",
]  # fmt: skip

# Storage of a number; "tf32" is float32 multiplied on the matrix units, "fp32" is float32 multiplied exactly.
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "tf32": 4, "fp32": 4}
LSE_BYTES = 4
# Larger cells do not fit one program: their gradients take two passes like any other pattern's.
ONE_PASS_KEYS = 256


@dataclass(frozen=True, eq=False)
class Device:
    """Rates of a device, per second; None, or no entry, where no reliable figure is at hand.

    Attributes:
        name: as in `DEVICES`.
        source: where the rates come from and what kind of figure they are.
        dram_bytes_per_s, l2_bytes_per_s: of device memory and of the second-level cache.
        matrix_flops_per_s: by name of the dtype (keys of `DTYPE_BYTES`), dense, two a multiply-add.
        exp_per_s: exponentials.
        issue_per_s: instructions of single lanes (32 a warp instruction).
    """

    name: str
    source: str
    dram_bytes_per_s: float
    l2_bytes_per_s: float | None
    matrix_flops_per_s: Mapping[str, float]
    exp_per_s: float | None
    issue_per_s: float | None


def _lanes(processors: int, clock: float) -> tuple[float, float]:
    """(exponentials, lane instructions) per second: an SM makes 16 and 4 x 32 of them a clock, sm_80 to sm_90."""
    return 16 * processors * clock, 128 * processors * clock


def _h200() -> Device:
    exp, issue = _lanes(132, 1.755e9)
    source = (
        "attainable rates assumed by the kernel study, to be measured: 4.3 of the data sheet's 4.8 TB/s, "
        "790 of its 989 TFLOP/s, L2 estimated; exponentials and instructions at 1.755 GHz"
    )
    # Exact float32 products go through the vector units: two FLOPs an instruction of a lane.
    matrix = {"bf16": 790e12, "fp16": 790e12, "tf32": 395e12, "fp32": 2 * issue}
    return Device("h200", source, 4.3e12, 5.5e12, matrix, exp, issue)


def _h100() -> Device:
    exp, issue = _lanes(132, 1.98e9)
    source = (
        "peaks of the SXM5 data sheet, not attainable ones; exponentials and instructions at 1.98 GHz; L2 unpublished"
    )
    return Device(
        "h100", source, 3.35e12, None, {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}, exp, issue
    )


def _a100() -> Device:
    exp, issue = _lanes(108, 1.41e9)
    source = (
        "peaks of the SXM4 80 GB data sheet and the architecture's white paper (L2: 5120 bytes a clock), "
        "not attainable ones; exponentials and instructions at 1.41 GHz"
    )
    matrix = {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12}
    return Device("a100", source, 2.039e12, 5120 * 1.41e9, matrix, exp, issue)


def _b200() -> Device:
    source = "peaks of the HGX data sheet, not attainable ones: memory and matrix units only, the rest left out"
    return Device("b200", source, 8e12, None, {"bf16": 2250e12, "fp16": 2250e12, "tf32": 1125e12}, None, None)


DEVICES: dict[str, Device] = {device.name: device for device in (_h200(), _h100(), _a100(), _b200())}


@dataclass(frozen=True)
class Call:
    """One attention call, by its sizes.

    Attributes:
        batch, heads, head_dim: of q, k and v alike.
        queries, keys: tokens of one image.
        pairs: (query, key) pairs of one image that the pattern asks for, zero-padded keys included.
        cells: whether queries and keys fall into cells that see each other whole, so that one pass over the cells makes
            all gradients; otherwise dq and dk, dv take a pass each.
        dtype: a key of `DTYPE_BYTES`.
    """

    batch: int
    heads: int
    head_dim: int
    queries: int
    keys: int
    pairs: int
    cells: bool
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"unknown dtype {self.dtype!r}: choose one of {', '.join(DTYPE_BYTES)}")

    @classmethod
    def of(
        cls, pattern: Pattern, batch: int, height: int, width: int, heads: int, head_dim: int, dtype: str = "bf16"
    ) -> Call:
        """The call of `pattern` on a height x width key map.

        Raises:
            ValueError: unknown dtype, or a map on which the pattern is not defined.
        """
        resolved = resolve(pattern, height, width)
        y, x = resolved.y, resolved.x
        pairs = int(y.counts.sum()) * int(x.counts.sum())
        cells = _in_cells(y) and _in_cells(x) and int(y.counts.max() * x.counts.max()) <= ONE_PASS_KEYS
        return cls(batch, heads, head_dim, y.queries * x.queries, height * width, pairs, cells, dtype)

    @property
    def query_bytes(self) -> int:
        """Of one tensor as large as q."""
        return self.batch * self.queries * self.heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def key_bytes(self) -> int:
        """Of one tensor as large as k."""
        return self.batch * self.keys * self.heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def lse_bytes(self) -> int:
        """Of the logarithms of the softmax sums."""
        return self.batch * self.queries * self.heads * LSE_BYTES

    @property
    def scores(self) -> int:
        """Scores that the pattern asks for, all images and heads."""
        return self.batch * self.heads * self.pairs


def _in_cells(axis: Axis) -> bool:
    """Whether any two queries of this axis see the same keys or none in common, and no key is padding."""
    first, past = axis.start, axis.start + axis.counts * axis.step
    if first.min() < 0 or axis.stop.max() > axis.keys:
        return False
    cells = np.unique(np.stack([first % axis.step, first, past], axis=1), axis=0)
    same_class = cells[1:, 0] == cells[:-1, 0]
    return bool((~same_class | (cells[1:, 1] >= cells[:-1, 2])).all())


@dataclass(frozen=True)
class Floor:
    """Seconds that each resource needs; None where the device's rate is not known."""

    memory: float
    l2: float | None
    matrix: float | None
    exp: float | None
    issue: float | None

    @property
    def seconds(self) -> float:
        """The largest known term."""
        return max(self._known().values())

    @property
    def bound(self) -> str:
        """Name of the largest known term."""
        known = self._known()
        return max(known, key=lambda name: known[name])

    def _known(self) -> dict[str, float]:
        return {name: term for name, term in asdict(self).items() if term is not None}


@dataclass(frozen=True)
class Work:
    """What one direction of a call asks of a device: bytes of memory and cache, FLOPs, exponentials, instructions."""

    dtype: str
    dram_bytes: float
    l2_bytes: float
    flops: float
    exponentials: float
    instructions: float

    def on(self, device: Device) -> Floor:
        """How long the device needs for each."""
        return Floor(
            memory=self.dram_bytes / device.dram_bytes_per_s,
            l2=_time(self.l2_bytes, device.l2_bytes_per_s),
            matrix=_time(self.flops, device.matrix_flops_per_s.get(self.dtype)),
            exp=_time(self.exponentials, device.exp_per_s),
            issue=_time(self.instructions, device.issue_per_s),
        )


def _time(amount: float, rate: float | None) -> float | None:
    return None if rate is None else amount / rate


@dataclass(frozen=True)
class _PerScore:
    """What a computed score costs: products of head_dim multiply-adds, exponentials, instructions (a budget)."""

    products: int
    exponentials: int
    instructions: int


_FORWARD = _PerScore(2, 1, 10)
_BACKWARD_ONE_PASS = _PerScore(5, 1, 20)
_BACKWARD_TWO_PASSES = _PerScore(7, 2, 28)


def forward_work(call: Call, *, factor: float = 1.0, reread: float = 1.0) -> Work:
    """The forward: reads q, k, v, writes o and the logarithms of the softmax sums, once.

    Args:
        call: its sizes.
        factor: computed over useful scores (>= 1), as tiles make it: 1 / (1 - waste).
        reread: how often tiles read each key and value from the second-level cache: 3.06 for 8x8 tiles with 14x14 keys.
    """
    streamed = 2 * call.query_bytes + call.lse_bytes
    return _work(call, streamed, 2 * call.key_bytes, _FORWARD, factor, reread)


def backward_work(call: Call, *, factor: float = 1.0, reread: float = 1.0, passes: int | None = None) -> Work:
    """The backward, in one pass or two.

    One pass moves 7 tensors (q, k, v, do in, dq, dk, dv out; the softmax is made again whole). Two passes move 12: q,
    o, do, k, v in and dq out, then q, do, k, v in and dk, dv out; the tiles of the second reread q and do.

    Args:
        call: its sizes.
        factor, reread: as in `forward_work`.
        passes: 1 or 2; None takes 1 where the pattern's cells allow it.
    """
    if passes is None:
        passes = 1 if call.cells else 2
    if passes == 1:
        streamed, tiled = 3 * call.query_bytes + 2 * call.key_bytes, 2 * call.key_bytes
    else:
        streamed, tiled = 4 * (call.query_bytes + call.key_bytes), 2 * (call.query_bytes + call.key_bytes)
    return _work(call, streamed, tiled, _BACKWARD_ONE_PASS if passes == 1 else _BACKWARD_TWO_PASSES, factor, reread)


def forward_floor(call: Call, device: Device, *, factor: float = 1.0, reread: float = 1.0) -> Floor:
    """Floor of `forward_work` on a device."""
    return forward_work(call, factor=factor, reread=reread).on(device)


def backward_floor(
    call: Call, device: Device, *, factor: float = 1.0, reread: float = 1.0, passes: int | None = None
) -> Floor:
    """Floor of `backward_work` on a device."""
    return backward_work(call, factor=factor, reread=reread, passes=passes).on(device)


def _work(call: Call, streamed: int, tiled: int, costs: _PerScore, factor: float, reread: float) -> Work:
    """From the bytes that tiles read once (`streamed`) and `reread` times (`tiled`), and the scores they compute."""
    computed = call.scores * factor
    return Work(
        dtype=call.dtype,
        dram_bytes=streamed + tiled,
        l2_bytes=streamed + tiled * reread,
        flops=2 * costs.products * call.head_dim * computed,
        exponentials=costs.exponentials * computed,
        instructions=costs.instructions * computed,
    )
