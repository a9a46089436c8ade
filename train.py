"""Train a model: `python train.py [group=option] [key=value]`; `--help` lists the groups; the last line is JSON."""

from __future__ import annotations

import os
import sys

# Read when torch loads. Threads that wait by spinning make a small model 7 times slower on 2 cores as soon as one other
# program runs; sleeping costs next to nothing when none does.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main() -> None:
    """The console entry point `nearfield-train`."""
    from nearfield.engine import config, door

    def job(values: config.TrainConfig, overrides: list[str]) -> dict[str, object]:
        from nearfield.engine import fit

        return fit.train(values, overrides)

    sys.exit(door.run("train", config.TrainConfig, job))


if __name__ == "__main__":
    main()
