"""What a model sees in pictures: classes, objects or class maps, as json and as annotated pictures.

    python scripts/predict.py cat.jpg --model nat_tiny --pretrained
    python scripts/predict.py photos/ --checkpoint runs/detection/2026-01-01_12-00-00_nat_nano
    python scripts/predict.py "photos/*.png" --model nat_tiny --head upernet --checkpoint FILE --names classes.txt
    python scripts/predict.py cat.jpg dog.jpg --model swin_tiny --checkpoint swin_tiny_patch4_window7_224.pth --topk 3

PICTURE is a file, a folder or a pattern; of the last two, what this command wrote is left out, counted. A picture that
cannot be read, or its results not written, is one line on stderr, and the rest is done. In --output: results.json,
NAME.predicted.png for every picture, for segmentation also NAME.classes.png (the class of each pixel). The last line
printed is one of JSON. Exit code 1 if no picture worked, 2 for what cannot be done at all.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

# as train.py and eval.py have it
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from _classify import TOP
from _predict_inputs import RESULTS, gather
from _predict_models import HEADS, TASKS, load
from _predict_tasks import PICTURE, Prediction, Predictor, predictor
from nearfield.engine import hardware
from nearfield.engine.config import HardwareConfig
from nearfield.engine.dense.decode import MODES, read_image
from nearfield.engine.dense.drawing import write_picture
from nearfield.engine.errors import INTERRUPTED, DataError, UserError
from torch import Tensor

LONGEST = 200  # bytes of a picture's name that its results take over: most systems have 255 for all of a name
# what keeps any picture from being written; other errors are those of one picture
FOLDERS_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.ENOENT, errno.ENOTDIR)


def main(argv: Sequence[str] | None = None) -> int:
    """Look at the pictures; 0, 1 if none of them worked, 2 for what cannot be done."""
    options = _parser().parse_args(argv)
    try:
        run = _Run(options)
    except (UserError, ValueError, OSError) as error:
        print(f"predict: {_line(error).replace('model.checkpoint=', '--checkpoint ')}", file=sys.stderr)
        return 2
    interrupted = False
    try:
        try:
            run.all()
        except KeyboardInterrupt:
            interrupted = True
            print("predict: interrupted: what was done is kept", file=sys.stderr)
        summary = run.write()
    except OSError as error:
        print(f"predict: {run.output}: cannot write there: {error.strerror or _line(error)}", file=sys.stderr)
        return 2
    print(json.dumps(summary))
    return INTERRUPTED if interrupted else 0 if run.records else 1


class _Run:
    """The pictures, one after another, and what came of them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.output: Path = options.output
        self.paths, wrong, self.left_out = gather(options.pictures, self.output)
        try:
            device = hardware.setup(HardwareConfig(device=options.device))
        except UserError as error:
            raise ValueError(str(error).replace("hardware.device", "--device")) from None
        self.loaded = load(options, device)
        if self.loaded.channels not in MODES:
            raise ValueError(f"{self.loaded.name} takes {self.loaded.channels} channels: pictures have 1, 3 or 4")
        self.predict: Predictor = predictor(self.loaded, device, threshold=options.threshold, topk=options.topk)
        self.output.mkdir(parents=True, exist_ok=True)
        self.records: list[dict[str, Any]] = []
        self.masks: list[list[dict[str, Any]]] = []
        self.errors: list[dict[str, str]] = []
        self.stems: set[str] = set()
        if self.left_out:
            print(f"predict: {self.left_out} pictures left out, which are results of this command", file=sys.stderr)
        for argument, message in wrong.items():
            self._failed(argument, message)

    @torch.inference_mode()
    def all(self) -> None:
        """Every picture, in batches; one that fails is left out of its batch."""
        for paths, images in self._batches():
            try:
                found = self.predict(images)
            except (ValueError, RuntimeError):
                found = []
            if found:
                for path, prediction in zip(paths, found, strict=True):
                    self._done(path, prediction)
                continue
            for path, image in zip(paths, images, strict=True):
                try:
                    prediction = self.predict([image])[0]
                except (ValueError, RuntimeError) as error:
                    self._failed(str(path), f"{path}: {_line(error)}")
                else:
                    self._done(path, prediction)

    def _batches(self) -> Iterator[tuple[list[Path], list[Tensor]]]:
        paths: list[Path] = []
        images: list[Tensor] = []
        for path in self.paths:
            try:
                images.append(read_image(path, self.loaded.channels))
            except DataError as error:
                self._failed(str(path), str(error))
                continue
            paths.append(path)
            if len(paths) == self.options.batch_size:
                yield paths, images
                paths, images = [], []
        if paths:
            yield paths, images

    def _done(self, path: Path, prediction: Prediction) -> None:
        stem = self._stem(path)
        try:
            files = {
                suffix: str(write_picture(self.output / f"{stem}.{suffix}.png", picture))
                for suffix, picture in prediction.pictures.items()
            }
        except OSError as error:
            if error.errno in FOLDERS_FAULT:
                raise
            self._failed(str(path), f"{path}: cannot write its results: {error.strerror or _line(error)}")
            return
        names = {"picture" if suffix == PICTURE else suffix + "_map": file for suffix, file in files.items()}
        self.records.append({"file": str(path), **prediction.record, **names})
        self.masks.append(prediction.masks)
        print(f"{_shown(path)}\n" + "\n".join(f"  {line}" for line in prediction.lines), flush=True)

    def _failed(self, file: str, message: str) -> None:
        self.errors.append({"file": file, "error": message})
        print(f"predict: {message}", file=sys.stderr, flush=True)

    def _stem(self, path: Path) -> str:
        """The start of the names of a picture's files: its own, cut if it is too long, numbered where two are alike."""
        name = os.fsencode(path.stem)
        own = path.stem if len(name) <= LONGEST else name[:LONGEST].decode("utf-8", "ignore")
        stem, number = own, 1
        while stem in self.stems:
            number += 1
            stem = f"{own}-{number}"
        self.stems.add(stem)
        return stem

    def write(self) -> dict[str, Any]:
        """Write results.json, which has the masks too, and give what is printed."""
        results = self.output / RESULTS
        summary = {
            "task": self.loaded.task,
            "model": self.loaded.name,
            "checkpoint": self.loaded.checkpoint,
            "images": len(self.records),
            "failed": len(self.errors),
            "left_out": self.left_out,
            "errors": self.errors,
            "output": str(self.output),
            "results": str(results),
        }
        rows = [
            {**record, "objects": [{**o, "mask": m} for o, m in zip(record["objects"], masks, strict=True)]}
            if masks
            else record
            for record, masks in zip(self.records, self.masks, strict=True)
        ]
        part = results.with_name(f".{RESULTS}.part")
        part.write_text(json.dumps({**summary, "predictions": rows}, indent=1) + "\n", encoding="utf-8")
        part.replace(results)
        return {**summary, "predictions": self.records}


def _shown(path: Path) -> str:
    """The path for a terminal: names need not be text."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


# --- command line -----------------------------------------------------------------------------------------------------


class _OneLineParser(argparse.ArgumentParser):
    """Errors without the usage before them."""

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        self.exit(2, f"predict: {message}\n")


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and (width or height).isdecimal() and int(height) and int(width or height)):
        raise argparse.ArgumentTypeError(f"{text!r} must be pixels, like 224 or 320x512")
    return int(height), int(width or height)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be between 0 and 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("pictures", nargs="+", metavar="PICTURE", help="a file, a folder, or a pattern in quotes")
    add("--model", metavar="NAME", help="the model or backbone (default what the run or the file says)")
    add("--checkpoint", metavar="FILE", help="a run folder, a weight file in one, or a path, URL or name of the index")
    add("--pretrained", action="store_true", help="the published classifier of that name")
    add("--weights", choices=("last", "best"), default="last", help="of a run folder (default last)")
    add("--task", choices=TASKS, help="default that of the run, or of --head, or classification")
    heads = [head for of_task in HEADS.values() for head in of_task]
    add("--head", choices=heads, metavar="HEAD", help=f"of a detector or segmentor: {', '.join(heads)}")
    add("--num-classes", type=_count, metavar="N", help="of a file that is in no run folder")
    add(
        "--names", type=Path, metavar="FILE", help="names of the classes, one a line (default the run's, or ImageNet's)"
    )
    add("--output", type=Path, default=Path("predictions"), metavar="FOLDER", help="default predictions")
    add("--threshold", type=_fraction, default=0.5, metavar="SCORE", help="least score of an object (default 0.5)")
    add("--topk", type=_count, default=TOP, metavar="K", help=f"classes named for a picture (default {TOP})")
    add("--size", type=_size, metavar="N|HxW", help="scale pictures to this (default what the model is made for)")
    add("--batch-size", type=_count, default=1, metavar="N", help="pictures at once (default 1)")
    add("--device", default="auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:N or mps (default auto)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
