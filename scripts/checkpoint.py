"""What a weight file is, the same weights in another layout, and whether a model runs on them.

    python scripts/checkpoint.py inspect nat_tiny.pth                        every model and layout that fit it
    python scripts/checkpoint.py convert nat_tiny.pth                        to nat_tiny.nearfield.safetensors
    python scripts/checkpoint.py convert run/best.safetensors --to shi-labs --output mine.pth --under model
    python scripts/checkpoint.py verify nat_tiny.pth --picture cat.jpg --names imagenet.txt
    python scripts/checkpoint.py convert wide.pth --model swin_tiny --set img_size=[224,448] --set window_size=[7,14]

FILE is a path, a URL, hf-hub:OWNER/NAME or a name of the index. Prints a summary and a last line of JSON; what cannot
be done is one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import nearfield
import torch
from nearfield import checkpoints
from nearfield.checkpoints import COUNTER, CheckpointMismatch, Entry, Layout, describe_mismatch
from nearfield.models import catalog
from nearfield.models.loading import CLASSIFIER, OURS, layouts_that_fit, position_tables, published_options
from torch import Tensor

State = Mapping[str, Tensor]


def main(argv: Sequence[str] | None = None) -> int:
    """Do what was asked for; 0, or 2 for what cannot be done."""
    options = _parser().parse_args(argv)
    try:
        result = options.action(options)
    except (ValueError, OSError) as error:
        print(f"checkpoint: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


class _File:
    """A weight file that was read, and what fits it."""

    def __init__(self, source: str, *, ema: bool) -> None:
        self.path = checkpoints.resolve(source)
        # not into the cache of downloads
        self.folder = self.path.parent if Path(source).expanduser().is_file() else Path()
        self.state = checkpoints.read(self.path, ema=ema)
        self.fits = layouts_that_fit(self.state)
        self.header = _header(self.path)
        known = checkpoints.find(self.path.name)
        self.entry: Entry | None = known if known is not None and known.file == self.path.name else None
        said = (self.header.get("model"), self.entry and self.entry.model)
        # by its header or its file name
        self.named: str | None = next((name for name in said if name in self.fits), None)

    def variant(self, name: str | None) -> catalog.Variant:
        """The model called ``name``; without one the model that the file says it is, else the first that fits."""
        if name is None:
            name = self.named or next(iter(self.fits), None)
            if name is None:
                raise CheckpointMismatch(f"{self.path} fits no model of this package: {_told(nearest(self.state))}")
        variant = catalog.get(name.partition(".")[0])
        if variant is None:
            raise ValueError(f"--model {name} is no model of this package: nearfield.list_models() names them")
        return variant


def _made_with(variant: catalog.Variant, arguments: Sequence[tuple[str, Any]]) -> catalog.Variant:
    """The variant with other arguments of its constructor.

    Raises:
        ValueError: an argument that it does not have.
    """
    if not arguments:
        return variant
    made = dataclasses.replace(variant, kwargs={**variant.kwargs, **dict(arguments)})
    try:
        made.skeleton()
    except TypeError as error:
        raise ValueError(f"--set: {error}") from None
    return made


def _header(path: Path) -> dict[str, str]:
    try:
        return checkpoints.read_metadata(path)
    except checkpoints.CheckpointError:
        return {}


class Near(NamedTuple):
    """A model that a file does not fit as it is.

    Attributes:
        models: names; several where they differ from the file alike.
        layout: of the file for them.
        tables_alone: whether position tables of other sizes are all that differs: loading resizes them.
        difference: from the first of them.
    """

    models: list[str]
    layout: str
    tables_alone: bool
    difference: str


def nearest(state: State) -> Near | None:
    """The models whose keys, and then shapes, differ least from a file's; None if no key is one of theirs."""
    found: dict[tuple[int, int], list[tuple[catalog.Variant, str, dict[str, Tensor]]]] = {}
    for variant in catalog.variants():
        try:
            ours, layout = checkpoints.convert(state, variant.family.layouts)
        except CheckpointMismatch:
            continue
        ours = _body(ours)
        both = ours.keys() & variant.shapes.keys()
        wrong = sum(ours[key].shape != variant.shapes[key] for key in both)
        if wrong < len(both):
            other_keys = len(ours.keys() ^ variant.shapes.keys())
            name = OURS if layout is None else layout.name
            found.setdefault((other_keys, wrong), []).append((variant, name, ours))
    if not found:
        return None
    alike = found[min(found)]
    first, layout_name, ours = alike[0]
    tables = position_tables(first.skeleton())
    shapes = [key for key in ours if ours[key].shape != first.shapes.get(key)]
    return Near(
        models=[variant.name for variant, _, _ in alike],
        layout=layout_name,
        tables_alone=ours.keys() == first.shapes.keys() and all(key in tables for key in shapes),
        difference=describe_mismatch(ours, first.shapes, limit=3),
    )


def _told(near: Near | None) -> str:
    if near is None:
        return "no key is one of its models'"
    names = " or ".join(near.models)
    if near.tables_alone:
        return f"it is {names}, layout {near.layout}, with position tables of another size: --model and --set say which"
    return f"nearest is {names}, layout {near.layout}, where {near.difference}"


def _body(state: State) -> dict[str, Tensor]:
    """All but the classifier, which is of any size."""
    return {key: value for key, value in state.items() if not key.startswith(CLASSIFIER)}


# --- inspect ----------------------------------------------------------------------------------------------------------


def inspect(options: argparse.Namespace) -> dict[str, Any]:
    """What is in a file, and every model and layout that fit it."""
    file = _File(options.file, ema=options.ema)
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in file.state.values())
    numbers = sum(value.numel() for value in file.state.values())
    print(f"{file.path}: {file.path.stat().st_size / 1e6:.1f} MB")
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items())
    print(f"  tensors    {len(file.state)} ({kinds}), {numbers:,} numbers")
    if file.entry is not None:
        top1 = "" if file.entry.top1 is None else f", published top-1 {file.entry.top1}"
        print(f"  by name    {file.entry.name}, licence {file.entry.licence}{top1} (the content is not compared)")
    for key, text in file.header.items():
        print(f"  header     {key}: {text}")
    size: dict[str, int] = {}
    for name, layout in file.fits.items():
        family = file.variant(name).family
        size = size or published_options(file.state, family)
        print(f"  fits       {name}, layout {layout}")
    if size:
        print(f"  made with  {', '.join(f'{key}={value}' for key, value in size.items())}")
    near = None if file.fits else nearest(file.state)
    if not file.fits:
        print(f"  fits no model of this package as it is: {_told(near)}")
    elif len(file.fits) > 1:
        print("  these models differ in nothing that a file stores: whoever made it must know which it is")
    return {
        "file": str(file.path),
        "bytes": file.path.stat().st_size,
        "tensors": len(file.state),
        "numbers": numbers,
        "dtypes": dtypes,
        "header": file.header,
        "published_as": file.entry and file.entry.name,
        "models": file.fits,
        **size,
        "nearest": near and near._asdict(),
    }


# --- convert ----------------------------------------------------------------------------------------------------------


def convert(options: argparse.Namespace) -> dict[str, Any]:
    """Write the same weights in another layout; nothing is written unless the way back gives the same bits."""
    file = _File(options.file, ema=options.ema)
    variant = _made_with(file.variant(options.model), options.set)
    if options.model is None and file.named is None:
        others = {catalog.get(name).family.layouts for name in file.fits}  # type: ignore[union-attr]
        if len(others) > 1:
            raise ValueError(f"{file.path} fits {', '.join(file.fits)}, whose layouts differ: say --model NAME")
    layouts = {layout.name: layout for layout in variant.family.layouts}
    ours, found = checkpoints.convert(file.state, layouts.values(), variant.shapes)
    shapes = {key: value.shape for key, value in ours.items()}
    if _body(ours).keys() != variant.shapes.keys():
        difference = describe_mismatch(_body(ours), variant.shapes, limit=3)
        raise CheckpointMismatch(f"{file.path} has other keys than {variant.name}: {difference}")
    if found is not None:
        _check_way_back(found.to_theirs(ours), file.state, found.name)
    to = options.to or _other_side(variant.name, found, layouts)
    if to not in (OURS, *layouts):
        raise ValueError(f"--to {to} is no layout of {variant.name}: it has {', '.join((OURS, *layouts))}")
    written = ours
    if to != OURS:
        written = layouts[to].to_theirs(ours)
        _check_way_back(layouts[to].to_ours(written, shapes), ours, to)
    output = options.output or file.folder / f"{file.path.stem}.{to}.safetensors"
    if output.resolve() == file.path.resolve():
        raise ValueError(f"{output} is the file that is read: say --output with another name")
    if output.suffix == ".safetensors":
        if options.under:
            raise ValueError("--under is for .pth files: safetensors holds tensors under their own keys only")
        about = {**file.header, "model": variant.name, "layout": to}
        about.pop("format", None)
        checkpoints.save(written, output, about)
    else:
        checkpoints.save_torch(written, output, options.under)
    left_out = sorted(file.state.keys() - (found.to_theirs(ours) if found else ours).keys())
    source = OURS if found is None else found.name
    print(f"{file.path}\n  {variant.name}, layout {source}, {len(file.state)} tensors")
    print(f"{output}\n  layout {to}, {len(written)} tensors; the way back gives the same bits")
    if left_out:
        print(f"  left out, no weights: {', '.join(left_out[:3])}{' ...' if len(left_out) > 3 else ''}")
    if to != OURS and layouts[to].drops:
        print("  not made up: masks and indices that the authors' code computes itself; load with strict=False there")
    return {
        "file": str(file.path),
        "model": variant.name,
        "layout": source,
        "output": str(output),
        "to": to,
        "tensors": len(written),
        "left_out": left_out,
        "way_back_equal": True,
    }


def _other_side(name: str, found: Layout | None, layouts: Mapping[str, Layout]) -> str:
    """Ours for a published layout; for ours the only published one."""
    if found is not None:
        return OURS
    if len(layouts) != 1:
        raise ValueError(f"the file has this package's layout already: say --to, {name} has {', '.join(layouts)}")
    return next(iter(layouts))


def _check_way_back(back: State, before: State, layout: str) -> None:
    for key, value in back.items():
        own = before.get(key)
        if own is None and key.endswith(COUNTER):  # files need not have it
            continue
        if own is None or own.shape != value.shape or not torch.equal(_bits(own), _bits(value)):
            raise CheckpointMismatch(
                f"{key} does not come back as it was through the layout {layout}: nothing is written"
            )


def _bits(tensor: Tensor) -> Tensor:
    """The bytes, for NaN to be equal to itself."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


# --- verify -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def verify(options: argparse.Namespace) -> dict[str, Any]:
    """Load a file into a model as strictly as ever, run a picture through it, and print the likeliest classes."""
    from _checkpoint_pictures import as_input  # pillow and timm.data, only for those who look
    from _classify import describe, likeliest, names_of_classes

    file = _File(options.file, ema=options.ema)
    variant = _made_with(file.variant(options.model), options.set)
    name = file.entry.name if file.entry is not None and file.entry.model == variant.name else variant.name
    options_of_file: dict[str, Any] = {"num_classes": 0, **published_options(file.state, variant.family)}
    names = names_of_classes(options.names, options_of_file["num_classes"])
    model: Any = nearfield.create_model(options.model or name, **{**options_of_file, **dict(options.set)}).eval()
    model.load_state_dict(file.state)
    picture, shown = as_input(options.picture, model, options.size)
    layout = file.fits.get(variant.name) or _layout_name(file.state, variant)
    others = [other for other in file.fits if other != variant.name]
    print(f"{file.path}\n  {options.model or name}, layout {layout}; every key and shape fits")
    if others and options.model is None:
        print(f"  it fits these as well, --model NAME chooses: {', '.join(others)}")
    if file.entry is not None and file.entry.model != variant.name:
        print(f"  by its name it was published for {file.entry.model}")
    print(f"  picture {shown}, as {'x'.join(map(str, picture.shape[1:]))}")
    out = model(picture)[0]
    if not out.isfinite().all():
        raise ValueError(f"{file.path}: the output of {variant.name} is not finite: the file holds broken weights")
    top: list[dict[str, Any]] = []
    if model.num_classes:
        top = likeliest(out, names)
        print("".join(f"  {line}\n" for line in describe(top)), end="")
    else:
        print(f"  no classifier in the file: {len(out)} features, mean {out.mean():.4f}, std {out.std():.4f}")
    return {
        "file": str(file.path),
        "model": options.model or name,
        "layout": layout,
        "fits_as_well": others,
        "picture": shown,
        "input": list(picture.shape[1:]),
        "classes": model.num_classes,
        "top": top,
    }


def _layout_name(state: State, variant: catalog.Variant) -> str:
    found = checkpoints.convert(state, variant.family.layouts, variant.shapes)[1]
    return OURS if found is None else found.name


# --- command line -----------------------------------------------------------------------------------------------------


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} must be pixels, like 224 or 320x512")
    return int(found[1]), int(found[2] or found[1])


def _argument(text: str) -> tuple[str, Any]:
    import yaml

    key, given, value = text.partition("=")
    if not given or not key.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} must be an argument of the model, like img_size=[224,448]")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: the value is no YAML") from error


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        raise argparse.ArgumentTypeError(f"{text!r} must end in .safetensors, or in .pth, .pt or .bin for torch.save")
    return path


class _OneLineParser(argparse.ArgumentParser):
    """Errors without the usage before them."""

    def error(self, message: str) -> NoReturn:
        """One line on stderr, exit code 2."""
        self.exit(2, f"checkpoint: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="command", required=True, metavar="inspect|convert|verify")

    def add(action: Any) -> argparse.ArgumentParser:
        made = actions.add_parser(action.__name__, help=action.__doc__, description=action.__doc__, allow_abbrev=False)
        made.set_defaults(action=action)
        made.add_argument("file", metavar="FILE", help="path, URL, hf-hub:OWNER/NAME or a name of the index")
        made.add_argument("--ema", action="store_true", help="the averaged weights of a training checkpoint")
        return made

    def of_model(made: argparse.ArgumentParser) -> None:
        made.add_argument("--model", metavar="NAME", help="whose weights they are (default the model that fits)")
        made.add_argument(
            "--set",
            type=_argument,
            metavar="KEY=VALUE",
            action="append",
            default=[],
            help="an argument that this model was made with, like img_size=[224,448]; may be repeated",
        )

    add(inspect)
    made = add(convert)
    made.add_argument("--to", metavar="LAYOUT", help=f"a layout of the family, or {OURS} (default the other side)")
    made.add_argument("--output", type=_output, metavar="FILE", help="default FILE.LAYOUT.safetensors beside FILE")
    made.add_argument("--under", metavar="KEY", help="in a .pth: {KEY: weights}, as the authors' loaders want it")
    of_model(made)
    made = add(verify)
    made.add_argument("--picture", type=Path, metavar="FILE", help="an image (default one that is drawn)")
    made.add_argument("--names", type=Path, metavar="FILE", help="names of the classes, one a line (default numbers)")
    of_model(made)
    made.add_argument("--size", type=_size, metavar="N|HxW", help="of the picture (default the model's own)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
