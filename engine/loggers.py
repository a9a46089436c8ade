"""Where the numbers of an epoch go: metrics.csv always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import csv
import io
import logging
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from .config import LoggerConfig, WandbConfig
from .errors import ConfigError

_logger = logging.getLogger("nearfield.engine")


class Logger(Protocol):
    """Takes one row of numbers per epoch."""

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Record the row of an epoch that ended at update `step`."""

    def close(self) -> None:
        """Flush and let go."""


class CsvLogger:
    """metrics.csv: one row per epoch, on disk as soon as it is logged. A new column writes a new file in its place."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns: list[str] = []
        self.rows: list[dict[str, Any]] = []

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Add a row."""
        self.rows.append({key: _short(value) for key, value in row.items()})
        fresh = [key for key in row if key not in self.columns]
        if fresh:
            self.columns += fresh
            part = self.path.with_name(f".{self.path.name}.part")
            self._write(part, "w", self.rows)
            part.replace(self.path)
        else:
            self._write(self.path, "a", self.rows[-1:])

    def close(self) -> None:
        """Nothing is held open."""

    def _write(self, path: Path, mode: str, rows: list[dict[str, Any]]) -> None:
        with path.open(mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)


class TensorBoardLogger:
    """TensorBoard event files in the run folder."""

    def __init__(self, path: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError("logger: tensorboard is not installed: pip install tensorboard, or logger=csv") from error
        self.writer = SummaryWriter(str(path / "tensorboard"))

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Every number of the row as a scalar."""
        for key, value in row.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


class WandbLogger:
    """Weights & Biases: offline, or online with offline in its place when there is no key or no answer in time."""

    def __init__(self, path: Path, config: WandbConfig, values: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ConfigError("logger: wandb is not installed: pip install wandb, or logger=csv") from error
        mode = config.mode
        if mode == "online" and not _has_key(wandb):
            _logger.warning("wandb: no API key (wandb login, or WANDB_API_KEY): logging offline")
            mode = "offline"
        try:
            self.run = self._start(wandb, path, config, values, mode)
        except Exception as error:  # whatever the server or the network does, training goes on
            if mode == "offline":
                raise ConfigError(f"logger: wandb does not start: {error}; use logger=csv") from error
            _logger.warning("wandb: no connection (%s): logging offline", error)
            self.run = self._start(wandb, path, config, values, "offline")

    @staticmethod
    def _start(wandb: Any, path: Path, config: WandbConfig, values: Mapping[str, Any], mode: str) -> Any:
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            init_timeout=config.timeout,
            login_timeout=config.timeout,
            finish_timeout=config.timeout,
            finish_timeout_raises=False,
        )
        return wandb.init(
            project=config.project,
            entity=config.entity,
            name=config.name or path.name,
            tags=config.tags,
            dir=str(path),
            mode=mode,
            config=dict(values),
            settings=settings,
        )

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """The row as it is."""
        self.run.log(dict(row), step=step)

    def close(self) -> None:
        """Finish the run; at most the timeout is spent on uploading."""
        try:
            self.run.finish()
        except Exception as error:
            _logger.warning("wandb: not everything was uploaded (%s): wandb sync", error)


def create_loggers(config: LoggerConfig, path: Path, values: Mapping[str, Any]) -> list[Logger]:
    """The loggers of a run: csv first, then those of the configuration. `values` is the whole configuration."""
    loggers: list[Logger] = [CsvLogger(path / "metrics.csv")]
    for name in dict.fromkeys(config.names):
        loggers.append(TensorBoardLogger(path) if name == "tensorboard" else WandbLogger(path, config.wandb, values))
    return loggers


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a csv file that several programs may append to; the header is written with the first row.

    Raises:
        ConfigError: the file has other columns, or cannot be written.
    """
    columns = list(row)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+", newline="", encoding="utf-8") as file:
            _lock(file)
            file.seek(0)
            header = file.readline().rstrip("\r\n")
            wanted = _line(columns).rstrip("\r\n")
            if header and header != wanted:
                raise ConfigError(f"paths.results={path}: its columns are {header}, not {wanted}: name another file")
            # one write, at the end wherever that is by now
            file.write(("" if header else _line(columns)) + _line([_short(row[key]) for key in columns]))
    except OSError as error:
        raise ConfigError(f"paths.results={path}: cannot write there ({error.strerror}): name another file") from error


def _lock(file: Any) -> None:
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    fcntl.flock(file, fcntl.LOCK_EX)


def _line(values: list[Any]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _has_key(wandb: Any) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(wandb.Settings().base_url).netloc
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
