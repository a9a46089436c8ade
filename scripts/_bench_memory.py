"""Peak memory of one forward pass in a fresh process: `python _bench_memory.py MODEL SIZE` prints one JSON object.

What counts is resident memory at its highest during the pass, less resident memory before it, when model and image are
there and the libraries have started.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

METHOD = "growth of resident memory over one pass in a fresh process"


def measured(model: str, size: int) -> float:
    """MiB that one forward pass of `model` on one size x size image needs, measured in a process of its own."""
    command = [sys.executable, str(Path(__file__)), model, str(size)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"memory of {model} at {size} was not measured: {done.stderr.strip().splitlines()[-1:]}")
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def _status(field: str) -> float:
    """MiB of one field of this process's status (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _reset_peak() -> bool:
    """Make the peak of resident memory start anew; whether that was possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def main() -> None:
    """Make the model, run it once, print the figures."""
    import nearfield
    import torch

    name, size = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any = nearfield.create_model(name, img_size=size).eval()
    image = torch.randn(1, 3, size, size)
    with torch.no_grad():
        # a model of one size only cannot take a small image, its layers can
        torch.nn.Conv2d(3, 64, 4, 4)(image[:, :, :64, :64])
        torch.nn.Linear(64, 64)(torch.randn(64, 64))
        if _reset_peak():
            before = _status("VmRSS")
            model(image)
            peak = _status("VmHWM")
        else:  # then the peak of construction is in it, which is smaller
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            model(image)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"model": name, "size": size, "before_mib": before, "peak_mib": peak - before}))


if __name__ == "__main__":
    main()
