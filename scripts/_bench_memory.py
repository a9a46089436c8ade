"""Peak memory of one forward pass in a fresh process, printed as one JSON object.

    python _bench_memory.py MODEL HEIGHT WIDTH          a classifier
    python _bench_memory.py MODEL HEIGHT WIDTH dense    a backbone under the FPN of a detector

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


def measured(model: str, size: tuple[int, int], *, dense: bool = False) -> float:
    """MiB that one forward pass of `model` on one image (height, width) needs, measured in a process of its own.

    dense: measure the model of that name of `_bench_dense` instead of the classifier.
    """
    command = [sys.executable, str(Path(__file__)), model, *map(str, size), *["dense"] * dense]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"memory of {model} at {size[0]}x{size[1]} was not measured: {done.stderr.strip().splitlines()[-1:]}"
        )
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

    name, height, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: Any
    if sys.argv[4:] == ["dense"]:
        from _bench_dense import dense_model

        model = dense_model(name, (height, width))
    else:
        model = nearfield.create_model(name, img_size=(height, width)).eval()
    image = torch.randn(1, 3, height, width)
    with torch.inference_mode():
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
    print(json.dumps({"model": name, "size": [height, width], "before_mib": before, "peak_mib": peak - before}))


if __name__ == "__main__":
    main()
