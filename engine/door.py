"""What `train.py` and `eval.py` share: Hydra composes, the schema checks, errors become one line and an exit code."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from . import check
from .config import TrainConfig
from .errors import (
    INTERRUPTED,
    OK,
    CheckpointMismatchError,
    ConfigError,
    DeviceError,
    Interrupted,
    UserError,
    listing,
    nearest,
)

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
_NEEDS_VALUE = {"--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--package", "-p"}
_TAKES_VALUE = _NEEDS_VALUE | {"--info", "-i"}
_FLAGS = _TAKES_VALUE | {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--resolve", "--run", "-r"}
_FLAGS |= {"--multirun", "-m", "--shell-completion", "-sc", "--experimental-rerun"}
_OVERRIDE = re.compile(r"(?P<sign>\+\+|\+|~)?(?P<key>[A-Za-z_][\w./@:-]*)=(?P<value>.*)", re.DOTALL)
_OWN_DATA = re.compile(r"\+{0,2}data(?:\.name)?=(?!(?:scenes|synthetic)$)(?P<name>.*)")
T = TypeVar("T")
Job = Callable[[T, list[str]], dict[str, Any]]


def run(door: str, kind: type[T], job: Job[T], argv: Sequence[str] | None = None) -> int:
    """Runs a door's job on the configuration that the command line asks for.

    Args:
        door: `train` or `eval`: the name of its file in configs/.
        kind: the dataclass of its configuration.
        job: gets the configuration and the keys and groups that the command line set; called once, or once per
            combination of a sweep (-m). What it returns is printed as one line of JSON, the last on stdout.
        argv: the arguments; sys.argv without the program by default.

    Returns:
        The exit code: 0, or that of the error, which is printed as one line on stderr.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        with _routed_warnings():
            _compose(door, kind, job, arguments)
    except Interrupted as stop:
        return _complain(door, str(stop), INTERRUPTED)
    except KeyboardInterrupt:
        return _complain(door, "interrupted", INTERRUPTED)
    except SystemExit as leave:
        return leave.code if isinstance(leave.code, int) else OK
    except Exception as error:
        if any(argument.lstrip("+").lower() == "traceback=true" for argument in arguments):
            traceback.print_exc()
        user_error = explain(error)
        return _complain(door, str(user_error), user_error.exit_code)
    return OK


def compose(door: str, kind: type[T], overrides: Sequence[str] = ()) -> T:
    """The checked configuration that `overrides` (as on the command line) give, for programs and tests.

    Raises:
        UserError: what the command line would have printed.
    """
    import hydra

    try:
        with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return _checked(kind, hydra.compose(door, overrides=expand(kind, overrides)[1]))
    except Exception as error:
        raise explain(error) from error


def expand(kind: type, arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Command line arguments in the form Hydra wants: its flags, and the overrides.

    `key=value` is allowed for every key of `kind`, also those that no yaml file mentions; `model=NAME` for every model;
    `experiment=` means `+experiment=`; a debug group goes on top of all other groups; a task brings the small data,
    model and training of its demo (configs/demo), or, where data are named, what fine-tuning on them starts from
    (configs/finetune), unless there is an experiment to say that.

    Raises:
        ConfigError: an argument that is no flag and no override, or a key that `kind` does not have.
    """
    flags: list[str] = []
    out: list[str] = []
    last: list[str] = []
    folders = _folders(arguments)
    groups = _groups(kind, folders)
    has_experiment = any(re.match(r"\+{0,2}experiment=", argument) for argument in arguments)
    own_data = next((match["name"] for match in map(_OWN_DATA.fullmatch, arguments) if match), None)
    if arguments and arguments[-1] in _NEEDS_VALUE:
        raise ConfigError(f"{arguments[-1]}: its value is missing")
    for before, argument in zip(["", *arguments], arguments, strict=False):
        match = _OVERRIDE.fullmatch(argument)
        if before in _TAKES_VALUE:
            flags.append(argument)
        elif argument.startswith("-"):
            flag = argument.split("=")[0]
            if flag not in _FLAGS:
                raise ConfigError(
                    f"{flag}: no such flag{nearest(flag, sorted(_FLAGS), count=1)}; --help says what there is"
                )
            flags.append(argument)
        elif argument.startswith("~"):
            out.append(argument)
        elif match is None:
            raise ConfigError(
                f"{argument!r} is not an override: write KEY=VALUE or GROUP=OPTION (--help lists the groups)"
            )
        else:
            sign, key, value = match["sign"] or "", match["key"], match["value"]
            group = key.split("@")[0]
            options = {path.stem for folder in folders for path in (folder / group).glob("*.yaml")}
            if group == "hydra" or group.startswith(("hydra.", "hydra/")):
                out.append(argument)
            elif group == "model" and not set(value.split(",")) <= options:
                out.append(f"++model.name={value}")
            elif group == "experiment" and group in groups:
                out.append(f"+experiment={value}")
            elif group == "task" and not sign and kind is TrainConfig and not has_experiment:
                if "," in value:
                    raise ConfigError(f"task={value}: each task has data and a model of its own: run them one by one")
                out += [argument, *_brought(folders, value, own_data)]
            elif group in groups:
                if re.fullmatch(r"[\w./,-]+", value) and not {"null", *options} >= set(value.split(",")):
                    raise _no_option(group, value, options)
                if group != "debug":
                    out.append(f"{sign}{key}={value}")
                elif value != "null":  # behind what a task or an experiment brings
                    last.append(f"+debug@_global_={value}")
            else:
                wrong = check.locate(kind, key, sorted(groups))
                if wrong is not None:
                    raise wrong
                out.append(f"++{key}={value}")
    return flags, out + last


def _brought(folders: Sequence[Path], task: str, own_data: str | None) -> list[str]:
    """What a task brings: its demo, or what fine-tuning starts from on those data, on any."""
    group = "demo" if own_data is None else "finetune"

    def of(data: str | None) -> str | None:
        names = (f"{task}_{data}", task)
        found = (name for name in names for folder in folders if (folder / group / f"{name}.yaml").is_file())
        return next(found, None)

    brought = {of(data) for data in (own_data or "").split(",")}
    if len(brought) > 1:
        raise ConfigError(f"data={own_data}: what training starts from differs among them: run them one by one")
    return [f"+{group}={name}" for name in brought if name]


def _folders(arguments: Sequence[str]) -> list[Path]:
    """Where yaml files are: configs/ and the folder that the user adds."""
    return [CONFIGS, *(Path(v) for f, v in itertools.pairwise(arguments) if f in ("--config-dir", "-cd"))]


def _groups(kind: type, folders: Iterable[Path]) -> set[str]:
    """The groups of the door whose configuration is `kind`: without those of training if it does not train."""
    groups = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_dir()}
    groups.discard("__pycache__")
    training = {f.name for f in dataclasses.fields(TrainConfig)} | {"debug", "demo", "experiment", "finetune"}
    return groups if kind is TrainConfig else groups - (training - {f.name for f in dataclasses.fields(kind)})


def _group_help(kind: type, folders: Sequence[Path]) -> str:
    options = {
        group: sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})
        for group in sorted(_groups(kind, folders))
    }
    return "\n".join(f"{group}: {', '.join(names)}" for group, names in options.items())


def touched(overrides: Sequence[str]) -> list[str]:
    """The keys and groups that Hydra's `overrides` set, without signs and values."""
    return [re.split(r"[=@]", override.lstrip("+~"), maxsplit=1)[0] for override in overrides]


def explain(error: BaseException) -> UserError:
    """`error` as something to show to the user: one line, and the exit code of its kind."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    from ..checkpoints.errors import CheckpointError

    text = str(error).strip()
    if isinstance(error, UserError):
        return error
    if isinstance(error, CheckpointError):
        return CheckpointMismatchError(text)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, option = error.missing_cfg_file.removesuffix(".yaml").rpartition("/")
        return _no_option(group, option, error.options)
    if isinstance(error, OverrideParseException):
        typed = str(error.override).lstrip("+")  # the signs are those of `expand`
        reason = text.splitlines()[0].replace(str(error.override), typed)
        return ConfigError(f"cannot read the override {typed!r}: {reason}")
    if isinstance(error, (HydraException, OmegaConfBaseException)):
        cause = f": {str(error.__cause__).splitlines()[0]}" if error.__cause__ and str(error.__cause__) else ""
        lines = [line for line in text.splitlines() if "HYDRA_FULL_ERROR" not in line]
        return ConfigError((lines[0] if lines else type(error).__name__) + cause)
    names = {base.__name__ for base in type(error).__mro__}
    if "OutOfMemoryError" in names:
        return DeviceError(
            "out of device memory: lower data.batch_size (raise trainer.accumulate by as much), "
            "or set model.grad_checkpointing=true"
        )
    if "InvalidCxxCompiler" in names or "InvalidCxxCompiler" in text:
        return DeviceError(
            "compile=true needs a C++ compiler on a CPU and finds none: install g++ or set compile=false"
        )
    first = next(iter(text.splitlines()), "")
    return UserError(f"{type(error).__name__}: {first} (traceback=true shows where)")


def _no_option(group: str, option: str, options: Iterable[str]) -> ConfigError:
    close = nearest(option, options, count=1)
    return ConfigError(f"{group}={option}: no such option{close}; allowed: {listing(sorted(options), limit=30)}")


def _compose(door: str, kind: type[T], job: Job[T], arguments: list[str]) -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    show = bool({"--cfg", "-c"} & set(arguments))
    if show:
        at = next(i for i, argument in enumerate(arguments) if argument in ("--cfg", "-c"))
        arguments = arguments[:at] + arguments[at + 2 :]

    failures: list[Exception] = []
    before = sys.argv

    def task(values: Any) -> None:
        sys.argv = before  # Hydra has read its form of it; what was typed goes into meta.json
        try:
            config = _checked(kind, values)
            if show:
                print(to_yaml(config), end="")  # noqa: T201 - what was asked for
                return
            result = job(config, touched(list(HydraConfig.get().overrides.task)))
            print(json.dumps(_finite(result)), flush=True)  # noqa: T201 - the contract: the last line on stdout
        except Exception as error:  # kept from Hydra, which would print lines of its own; a sweep goes on with the next
            failures.append(error)

    main = hydra.main(config_path="pkg://nearfield.configs", config_name=door, version_base="1.3")(task)
    flags, expanded = expand(kind, arguments)
    OmegaConf.register_new_resolver("groups", lambda: _group_help(kind, _folders(arguments)), replace=True)
    full_error = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing its own message and leaving
    # argparse takes the overrides in one piece: behind the flags
    sys.argv = [door, *flags, "--", *expanded, f"hydra.job.name={door}"]
    try:
        main()
    finally:
        sys.argv = before
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
    if failures:
        raise failures[0]


def to_yaml(config: Any) -> str:
    """A configuration, every key of it, as yaml."""
    import yaml

    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, width=120)


def _checked(kind: type[T], values: Any) -> T:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
    if not isinstance(plain, Mapping):
        raise ConfigError("the configuration is not a mapping")
    return check.build(kind, {str(key): value for key, value in plain.items() if key != "hydra"})


def _finite(result: Mapping[str, Any]) -> dict[str, Any]:
    """NaN and infinity are not JSON: null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in result.items()}


class _Warnings(logging.Handler):
    """Warnings of this package as lines on stdout: stderr is for the bar and for the one line of an error."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info:  # the traceback of an error is for train.log
            return
        print(f"{record.levelname.lower()}: {record.getMessage()}", flush=True)  # noqa: T201 - its purpose


@contextmanager
def _routed_warnings() -> Iterator[None]:
    """While a job runs, warnings of libraries go to train.log alone, those of this package to stdout too."""
    quiet, shown = logging.NullHandler(), _Warnings(logging.WARNING)
    handlers = {"py.warnings": quiet, "timm": quiet, "nearfield": shown}
    before = warnings.showwarning
    logging.captureWarnings(True)
    ours = warnings.showwarning is not before
    for name, handler in handlers.items():
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name, handler in handlers.items():
            logging.getLogger(name).removeHandler(handler)
        if ours:
            logging.captureWarnings(False)


def _complain(door: str, message: str, code: int) -> int:
    sys.stderr.write(f"{door}: {'error: ' if code != INTERRUPTED else ''}{message}\n")
    return code
