"""Evaluate a checkpoint: `python eval.py run=FOLDER`, or `model=NAME checkpoint=FILE data=folder data.root=FOLDER`."""

from __future__ import annotations

import os
import sys

# Read when torch loads. Threads that wait by spinning make a small model 7 times slower on 2 cores as soon as one other
# program runs; sleeping costs next to nothing when none does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """The console entry point `nearfield-eval`."""
    from nearfield.engine import config, door

    def job(values: config.EvalConfig, overrides: list[str]) -> dict[str, object]:
        from nearfield.engine import evaluation

        return evaluation.evaluate(values, overrides)

    sys.exit(door.run("eval", config.EvalConfig, job))


if __name__ == "__main__":
    main()
