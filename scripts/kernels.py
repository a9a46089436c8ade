"""What the compiled kernels are made of, for a GPU that need not be there; and their launch table, chosen from that.

    python scripts/kernels.py                                    every row of the shipped table, for sm_90
    python scripts/kernels.py --arch sm_80 --only "query half 32"
    python scripts/kernels.py --choose                           rewrite ops/triton/configs.json: hours on one core
    python scripts/kernels.py --choose --only "window.backward half"

Of every row's usual call: registers and spilled bytes of a thread, shared memory, programs that a multiprocessor holds,
matrix instructions and asynchronous copies in the code; instructions of a thread in the inner loop for each score that
is computed there, and of the whole kernel for each score that the pattern asks for. Nothing is run or timed. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # kernels cannot be compiled where they are interpreted, which is settled when Triton is imported
    from _choose import Figures
    from _kernel_cases import Row


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, or choose it anew; 0, or 2 where that cannot be done."""
    options = _parser().parse_args(argv)
    try:
        if os.environ.get("TRITON_INTERPRET") == "1":
            raise ValueError("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
        result = _choose(options.only) if options.choose else _table(options.only, options.arch)
    except ValueError as error:
        print(f"kernels: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


def _rows(only: str) -> list[Row]:
    from _kernel_cases import rows

    found = [row for row in rows() if only in row.name]
    if not found:
        raise ValueError(f"no row is called {only!r}: they are called like {rows()[0].name!r}")
    return found


def _table(only: str, arch: str) -> dict[str, Any]:
    from _bench_timing import grid
    from _choose import figures, shipped
    from _compiled import PROCESSORS

    if arch not in PROCESSORS:
        raise ValueError(f"unknown architecture {arch!r}: choose one of {', '.join(PROCESSORS)}")
    made = []
    for row in _rows(only):
        print(f"{row.name} ...", file=sys.stderr, flush=True)
        if found := shipped(row, arch):
            case, config, launches = found
            made.append(_line(row, figures(row, case, launches, arch, config)))
    if made:
        lines = [["" if value is None else str(value) for value in line.values()] for line in made]
        print(grid([[name.replace("_", " ") for name in made[0]], *lines]))
    return {"arch": arch, "kernels": made}


def _line(row: Row, made: Figures) -> dict[str, Any]:
    compiled = made.compiled
    known = compiled.registers is not None
    return {
        "row": row.name,
        "call": str(made.case),
        "config": list(astuple(made.config)),
        "registers": compiled.registers,
        "spilled": compiled.spill_bytes,
        "shared": compiled.shared_bytes,
        "programs": compiled.programs() if known else None,
        "matrix": compiled.matrix_instructions,
        "copies": compiled.async_copies if known else None,
        "per_score": round(made.per_score, 1) if known else None,
        "per_useful_score": round(made.per_useful_score, 1) if known else None,
    }


def _choose(only: str) -> dict[str, Any]:
    from _choose import choose_rows, replaced, written
    from nearfield.ops.triton.configs import SHIPPED, read_table

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    table, chosen = read_table(SHIPPED), 0
    for rows, found in choose_rows(_rows(only), table, say):
        table = replaced(table, rows, found)
        # Written whole after every call's rows: what was found is kept if the rest is stopped.
        SHIPPED.write_text(written(table), encoding="utf-8")
        chosen += len(found)
        print("\n".join(f"{key}: {list(astuple(config))}" for key, config in found.items()), flush=True)
    return {"chosen": chosen, "rows": len(table), "file": SHIPPED.name}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--arch", default="sm_90", help="what to compile for (default sm_90)")
    parser.add_argument("--only", default="", metavar="TEXT", help="rows with this in their names")
    parser.add_argument(
        "--choose", action="store_true", help="rewrite the shipped table instead, for all architectures"
    )
    return parser


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    sys.exit(main())
