"""`import nearfield` is cheap: no Triton, no CUDA, no Hydra, about the time of `import timm`."""

from __future__ import annotations

import os
import resource
import subprocess
import sys


def run(code: str) -> float:
    """Run code in a fresh interpreter, in a folder that is not the project's; its CPU seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/", env=os.environ.copy())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_import_pulls_in_nothing_heavy_that_timm_does_not_and_leaves_cuda_alone() -> None:
    heavy = ["triton", "hydra", "omegaconf", "wandb", "sklearn", "scipy", "matplotlib", "tensorboard", "rich"]
    run(
        f"import sys, timm, torch; before = [m for m in {heavy} if m in sys.modules]\n"
        f"import nearfield; assert [m for m in {heavy} if m in sys.modules] == before, before\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert 'nearfield.models.dense' not in sys.modules\n"
        "assert not {'ops', 'models', 'checkpoints', 'engine'} & set(sys.modules)"
    )


def test_every_cpu_path_works_without_triton() -> None:
    run(
        "import sys; sys.modules['triton'] = None\n"
        "import torch, timm, nearfield\n"
        "model = timm.create_model('nat_nano', num_classes=3)\n"
        "model(torch.randn(2, 3, 32, 32)).sum().backward()\n"
        "assert all(p.grad is not None for p in model.parameters())"
    )


def test_import_takes_about_as_long_as_timm() -> None:
    rounds = [(run("import timm"), run("import nearfield")) for _ in range(2)]
    timm, ours = (min(column) for column in zip(*rounds, strict=True))
    assert ours <= 1.2 * timm, f"import nearfield {ours:.2f} s, import timm {timm:.2f} s"
