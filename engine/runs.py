"""The folder of a run: made once, never overwritten, with everything that is needed to say what was done."""

from __future__ import annotations

import dataclasses
import datetime
import json
import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__, checkpoints
from .errors import ConfigError
from .hardware import cores

_LOGGERS = ("nearfield", "py.warnings", "timm")


class RunFolder:
    """`runs/<task>/<date_time>_<model>` with config.yaml, meta.json, metrics, curves, weights and train.log."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handler = logging.FileHandler(path / "train.log", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._raised: list[logging.Logger] = []
        for logger in map(logging.getLogger, _LOGGERS):
            logger.addHandler(self._handler)
            if logger.level == logging.NOTSET:
                logger.setLevel(logging.INFO)
                self._raised.append(logger)

    @classmethod
    def create(cls, root: str, task: str, model: str) -> RunFolder:
        """Make a new folder; one that exists gets a number behind its name.

        Raises:
            ConfigError: the folder cannot be written.
        """
        stamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        parent = Path(root).expanduser() / task
        name = f"{stamp}_{re.sub(r'[^A-Za-z0-9_.-]+', '-', model)}"
        number = 1
        while True:
            path = parent / (name if number == 1 else f"{name}_{number}")
            try:
                parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
                return cls(path)
            except FileExistsError:
                if not parent.is_dir():
                    raise ConfigError(f"paths.runs={root}: {parent} is a file, not a folder: choose another") from None
                number += 1
            except OSError as error:
                raise ConfigError(
                    f"paths.runs={root}: cannot write there ({error.strerror}): choose another"
                ) from error

    def close(self) -> None:
        """Detach train.log and leave logging as it was found."""
        for logger in map(logging.getLogger, _LOGGERS):
            logger.removeHandler(self._handler)
        for logger in self._raised:
            logger.setLevel(logging.NOTSET)
        self._handler.close()

    def write(self, name: str, text: str) -> Path:
        """Write a small file, all of it or nothing."""
        part = self.path / f".{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(self.path / name)
        return self.path / name

    def write_config(self, config: Any) -> None:
        """config.yaml: the whole configuration, resolved, with absolute data paths so that it works from any folder."""
        import yaml

        values = dataclasses.asdict(config)
        for group, key in (("data", "root"), ("data", "class_map"), ("model", "checkpoint")):
            value = values.get(group, {}).get(key)
            if value and Path(value).expanduser().exists():
                values[group][key] = str(Path(value).expanduser().resolve())
        head = "# The configuration of this run, every key of it.\n"
        self.write("config.yaml", head + yaml.safe_dump(values, sort_keys=False, width=120))

    def write_meta(self, meta: Mapping[str, Any]) -> None:
        """meta.json: where, when and with what it ran."""
        self.write("meta.json", json.dumps(meta, indent=2) + "\n")

    def write_weights(self, name: str, model: nn.Module, about: Mapping[str, Any]) -> Path:
        """`name`.safetensors with `about` in its header."""
        metadata = {key: str(value) for key, value in about.items()}
        return checkpoints.save(model.state_dict(), self.path / f"{name}.safetensors", metadata)


def config_of(folder: Path) -> dict[str, Any] | None:
    """The configuration in a run folder; None for any other folder, whatever files it has."""
    import yaml

    if not (folder / "meta.json").is_file():
        return None
    try:
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, yaml.YAMLError):
        return None
    groups = ("model", "data", "task", "hardware")
    return values if isinstance(values, dict) and all(isinstance(values.get(g), dict) for g in groups) else None


def class_names_of(folder: Path) -> list[str] | None:
    """The classes of a run, in the order of their labels; None if meta.json does not say or it is no run."""
    if config_of(folder) is None:
        return None
    try:
        names = json.loads((folder / "meta.json").read_text(encoding="utf-8")).get("class_names")
    except (OSError, ValueError, AttributeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) else None


def describe(device: torch.device, **more: Any) -> dict[str, Any]:
    """What goes into meta.json: command, revision, versions, device, time."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "folder": os.getcwd(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "git": git_revision(),
        "versions": versions(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        **more,
    }


def versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import numpy
    import timm
    import torchvision

    return {
        "nearfield": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "timm": timm.__version__,
        "numpy": numpy.__version__,
    }


def device_name(device: torch.device) -> str:
    """`cuda: NVIDIA H200`, `cpu: NAME OF THE PROCESSOR, 8 cores` and the like."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    return f"{device.type}: {_processor()}, {cores()} cores"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_revision() -> str | None:
    """The revision of the source tree that runs, `-dirty` behind it if it was changed; None outside a repository."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        described = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
