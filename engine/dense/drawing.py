"""Pictures of what a model sees: likely classes, boxes, masks and class maps over images, next to the ground truth.

Small images are enlarged, labels are put beside the objects and not on them, class maps get a legend.
"""

from __future__ import annotations

import colorsys
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .coco_metrics import binary_masks

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

LEAST, MOST = 480, 1600  # pixels: the short side after enlarging, and how long the other may become by that
_CELL = 800  # pixels: the longest side of a picture among others
UNNAMED = (90, 90, 90)  # the colour of what is ignored
_INK: Colour = (25, 25, 25)
_PAPER: Colour = (255, 255, 255)
# told apart by hue and by lightness, the most different first
_FIRST: tuple[Colour, ...] = (
    (230, 57, 70), (52, 136, 235), (255, 200, 40), (46, 170, 90), (170, 90, 220), (255, 135, 30), (50, 200, 205),
    (240, 110, 190), (150, 205, 60), (150, 100, 60), (110, 120, 230), (250, 170, 150),
)  # fmt: skip


def palette(count: int) -> list[Colour]:
    """A colour for each of `count` classes, always the same: a dozen chosen by hand, then steps round the wheel."""
    colours = list(_FIRST[:count])
    for index in range(count - len(colours)):
        hue = (0.07 + index * 0.618034) % 1
        rgb = colorsys.hsv_to_rgb(hue, (0.85, 0.5, 0.7)[index % 3], (0.95, 0.9, 0.6)[index % 3])
        colours.append((round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])))
    return colours


def draw_objects(
    image: Tensor,
    objects: Mapping[str, Tensor],
    class_names: Sequence[str],
    *,
    threshold: float = 0.0,
    largest: int | None = None,
) -> Image.Image:
    """Boxes with class and score, and masks where there are any.

    Args:
        image: (3, H, W) or (1, H, W), uint8, or floating point in [0, 1].
        objects: `boxes` (N, 4) xyxy in pixels of the image, `labels` (N,) of 0 .. K-1; `scores` (N,), `masks` (N, H, W)
            or (N, 1, H, W) and `iscrowd` (N,) if there are: predictions or ground truth.
        class_names: K names.
        threshold: objects with a lower score are left out.
        largest: pixels; an image with a longer side is shrunk before anything is drawn on it.

    Returns:
        The picture, whole times as large as the image where that is small.
    """
    base = _base(image, largest)
    scores = objects["scores"].detach().float().cpu() if "scores" in objects else None
    kept = list(range(len(objects["boxes"])))
    if scores is not None:
        kept = [i for i in scores.argsort(descending=True, stable=True).tolist() if scores[i] >= threshold]
    boxes = objects["boxes"].detach().float().cpu()[kept]
    labels = [int(label) for label in objects["labels"].tolist()]
    scale = torch.tensor([base.width / image.shape[-1], base.height / image.shape[-2]]).repeat(2)
    drawn: list[Box] = [tuple(box) for box in (boxes * scale).tolist()]
    colours = palette(len(class_names))
    thick, font = _stroke(base), _font(_font_size(base))
    pixels = np.array(base)
    if "masks" in objects and kept:
        masks = binary_masks(objects["masks"])[kept].cpu().numpy()
        for mask, i in zip(masks[::-1], kept[::-1], strict=True):  # the likeliest on top
            _paint_mask(pixels, mask, colours[labels[i]], max(1, thick // 2))
    picture = Image.fromarray(pixels)
    pen = ImageDraw.Draw(picture)
    for box, i in zip(drawn[::-1], kept[::-1], strict=True):
        pen.rectangle(_ordered(box), outline=colours[labels[i]], width=thick)
    taken: list[Box] = []
    for box, i in zip(drawn, kept, strict=True):
        text = class_names[labels[i]]
        if scores is not None:
            text += f" {float(scores[i]):.2f}"
        if "iscrowd" in objects and int(objects["iscrowd"][i]):
            text += " (crowd)"
        others = [other for other in drawn if other is not box]
        place = _place(box, pen.textbbox((0, 0), text, font=font), base.size, others, taken, thick)
        taken.append(place)
        _tag(pen, place, text, font, colours[labels[i]])
    return picture


def draw_class_map(
    image: Tensor,
    class_map: Tensor,
    class_names: Sequence[str],
    *,
    ignore: int = 255,
    opacity: float = 0.7,
    largest: int | None = None,
) -> Image.Image:
    """A class map over its image.

    Args:
        image: (3, H, W) or (1, H, W), uint8, or floating point in [0, 1].
        class_map: (H, W) or (1, H, W) of integers.
        class_names: K names; one called "background" gets no colour.
        ignore: this label, and any that is no class, is hatched in gray.
        opacity: of the colours, 0 to 1.
        largest: pixels; an image with a longer side is shrunk before anything is drawn on it.
    """
    base = _base(image, largest)
    labels = class_map.detach().cpu().reshape(class_map.shape[-2:]).to(torch.int64).numpy()
    labels = _resized(labels.astype(np.int32), base.size)
    known = (labels >= 0) & (labels < len(class_names)) & (labels != ignore)
    table = np.asarray([*class_colours(class_names), UNNAMED], np.float32)
    index = np.where(known, labels, len(class_names))
    pixels = np.asarray(base, np.float32)
    clear = np.asarray([name == "background" for name in class_names] + [False])[index]
    mixed = pixels + np.where(clear, 0, opacity)[..., None] * (table[index] - pixels)
    row, column = np.indices(labels.shape)
    mixed[~known & ((row + column) // (4 * _stroke(base)) % 2 == 0)] *= 0.6
    mixed[_edges(index, max(1, _stroke(base) // 2))] = _PAPER
    return Image.fromarray(mixed.round().astype(np.uint8))


def class_colours(class_names: Sequence[str]) -> list[Colour]:
    """The colours of class maps: as `palette`, and white for the class "background", which is not drawn."""
    others = iter(palette(len(class_names)))
    return [_PAPER if name == "background" else next(others) for name in class_names]


def legend(names: Mapping[str, Colour], width: int, size: int = 18) -> Image.Image:
    """A strip `width` pixels wide with a coloured field and the name of each class; `size` is that of the letters."""
    font, gap = _font(size), size // 2
    x, y, places = gap, gap, []
    for name in names:
        wide = round(font.getlength(name)) + 3 * size
        if x + wide > width and x > gap:
            x, y = gap, y + size + gap
        places.append((x, y))
        x += wide
    strip = Image.new("RGB", (width, y + size + gap), _PAPER)
    pen = ImageDraw.Draw(strip)
    for (x, y), (name, colour) in zip(places, names.items(), strict=True):
        pen.rectangle((x, y, x + 1.5 * size, y + size), fill=colour, outline=_INK)
        pen.text((x + 2 * size, y + size / 2), name, fill=_INK, font=font, anchor="lm")
    return strip


def draw_caption(image: Tensor, shares: Mapping[str, float]) -> Image.Image:
    """The image above a bar of each share, 0 to 1, with its name."""
    base = _base(image)
    size = _font_size(base)
    font, row = _font(size), size * 3 // 2
    picture = Image.new("RGB", (base.width, base.height + row * len(shares) + size // 2), _PAPER)
    picture.paste(base, (0, 0))
    pen, y = ImageDraw.Draw(picture), base.height + size // 4
    for name, share in shares.items():
        pen.rectangle((0, y + 1, share * base.width, y + row - 2), fill=(178, 211, 245))
        text, letters = _fitted(f"{share:.1%}  {name}", font, base.width - size)
        pen.text((size // 2, y + row / 2), text, fill=_INK, font=letters, anchor="lm")
        y += row
    return picture


def sheet(
    rows: Sequence[Sequence[Image.Image]], titles: Sequence[str], *, below: Image.Image | None = None
) -> Image.Image:
    """Pictures in rows and columns under the titles of the columns, each in the middle of its cell."""
    gap, size = 12, 20
    widths = [max(row[c].width for row in rows) for c in range(len(titles))]
    heights = [max(picture.height for picture in row) for row in rows]
    head = 2 * size
    foot = below.height if below is not None else 0
    out = Image.new(
        "RGB", (sum(widths) + gap * (len(widths) + 1), head + sum(heights) + gap * len(heights) + foot), _PAPER
    )
    pen, font, x = ImageDraw.Draw(out), _font(size), gap
    for c, title in enumerate(titles):
        text, letters = _fitted(title, font, widths[c])
        pen.text((x + widths[c] / 2, head / 2), text, fill=_INK, font=letters, anchor="mm")
        y = head
        for row, height in zip(rows, heights, strict=True):
            out.paste(row[c], (x + (widths[c] - row[c].width) // 2, y + (height - row[c].height) // 2))
            y += height + gap
        x += widths[c] + gap
    if below is not None:
        out.paste(below, (0, out.height - foot))
    return out


def write_detections(
    path: Path,
    images: Sequence[Tensor],
    outputs: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    *,
    threshold: float = 0.5,
) -> Path:
    """One picture file: a row for each image, ground truth on the left, predictions of at least `threshold` right.

    The arguments are as in `draw_objects`; a few images are enough to look at.
    """
    rows = [
        [
            draw_objects(image, target, class_names, largest=_CELL),
            draw_objects(image, output, class_names, threshold=threshold, largest=_CELL),
        ]
        for image, output, target in zip(images, outputs, targets, strict=True)
    ]
    return write_picture(path, sheet(rows, ["ground truth", f"prediction, score at least {threshold:g}"]))


def write_class_maps(
    path: Path,
    images: Sequence[Tensor],
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    class_names: Sequence[str],
    *,
    ignore: int = 255,
) -> Path:
    """One picture file: a row for each image with the image, its true and its predicted class map; and a legend.

    Args:
        path: of the file, replaced as a whole.
        images: as in `draw_class_map`, each of its own size.
        outputs: class maps (H, W), or logits (K, H, W).
        targets: class maps (H, W) or (1, H, W).
        class_names: K names.
        ignore: label of pixels that do not count.
    """
    maps = [output.argmax(0) if output.is_floating_point() else output for output in outputs]
    rows = [
        [
            _base(image, _CELL),
            draw_class_map(image, target, class_names, ignore=ignore, largest=_CELL),
            draw_class_map(image, found, class_names, ignore=ignore, largest=_CELL),
        ]
        for image, found, target in zip(images, maps, targets, strict=True)
    ]
    titles = ["image", "ground truth", "prediction"]
    width = sheet(rows, titles).width
    return write_picture(
        path, sheet(rows, titles, below=map_legend([*maps, *targets], class_names, width, ignore=ignore))
    )


def map_legend(maps: Sequence[Tensor], class_names: Sequence[str], width: int, *, ignore: int = 255) -> Image.Image:
    """The `legend` of the classes that are in the maps, in their order; `width` in pixels."""
    present = {int(label) for one in maps for label in one.unique().tolist()}
    pairs = enumerate(zip(class_names, class_colours(class_names), strict=True))
    names = {
        "background (not coloured)" if name == "background" else name: colour
        for label, (name, colour) in pairs
        if label in present and label != ignore
    }
    if any(label == ignore or not 0 <= label < len(class_names) for label in present):
        names["ignored"] = UNNAMED
    return legend(names, width)


def write_picture(path: Path, picture: Image.Image) -> Path:
    """Save a picture whole or not at all; the suffix says the format."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    picture.save(part, compress_level=1)  # of png: photographs shrink little more and take several times as long
    os.replace(part, path)
    return path


def _base(image: Tensor, largest: int | None = None) -> Image.Image:
    """The image in RGB: enlarged by a whole number until its short side has `LEAST` pixels, or shrunk to `largest`."""
    pixels = image.detach().cpu()
    if pixels.is_floating_point():
        pixels = (pixels.float().clamp(0, 1) * 255).round()
    pixels = pixels.to(torch.uint8).expand(3, -1, -1)
    picture = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    short, long = sorted(picture.size)
    if largest is not None and long > largest:
        width, height = (max(1, round(side * largest / long)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    times = max(1, min(math.ceil(LEAST / short), (largest or MOST) // long))
    return picture.resize((times * picture.width, times * picture.height), Image.Resampling.BICUBIC)


def _resized(values: NDArray[Any], size: tuple[int, int]) -> NDArray[Any]:
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.NEAREST))


def _paint_mask(pixels: NDArray[np.uint8], mask: NDArray[np.bool_], colour: Colour, line: int) -> None:
    """Tint what is inside a mask and draw its outline, in place."""
    inside = _resized(mask.astype(np.uint8), (pixels.shape[1], pixels.shape[0])).astype(bool)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        return
    # the rest of a photograph is not touched: a hundred masks on it take a moment, not a minute
    window = (
        slice(max(0, rows[0] - line), rows[-1] + 1 + line),
        slice(max(0, columns[0] - line), columns[-1] + 1 + line),
    )
    inside, part = inside[window], pixels[window].astype(np.float32)
    part[inside] += 0.45 * (np.asarray(colour, np.float32) - part[inside])
    part[_edges(inside, line)] = colour
    pixels[window] = part.round()


def _edges(labels: NDArray[Any], width: int) -> NDArray[np.bool_]:
    """Lines, `width` pixels wide, where one label meets another."""
    edges = np.zeros(labels.shape, bool)
    edges[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edges[:-1] |= labels[:-1] != labels[1:]
    for _ in range(width - 1):
        edges[:, 1:] |= edges[:, :-1].copy()
        edges[1:] |= edges[:-1].copy()
    return edges


def _stroke(picture: Image.Image) -> int:
    return max(2, round(min(picture.size) / 240))


def _font_size(picture: Image.Image) -> int:
    return max(15, round(min(picture.size) / 50))


def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # its DejaVu knows the letters of most languages

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: float) -> tuple[str, ImageFont.FreeTypeFont]:
    """Text and font for a line of `width` pixels: smaller letters, and where those would be too small, fewer."""
    font = font.font_variant(size=max(10, min(font.size, font.size * width / max(1, font.getlength(text)))))
    short = text
    while short and font.getlength(short) > width:
        text = text[:-1]
        short = f"{text.rstrip()}\N{HORIZONTAL ELLIPSIS}" if text else ""
    return short, font


def _ordered(box: Box) -> Box:
    return min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])


def _place(
    box: Box, text: Sequence[float], size: tuple[int, int], others: Sequence[Box], taken: Sequence[Box], gap: int
) -> Box:
    """Where a label goes: at the side of its box where it covers least of other objects, labels, and of its own."""
    w, h = text[2] + 6, text[3] + 4
    left, top, right, bottom = _ordered(box)
    corners = [
        (left, top - h), (right - w, top - h), (left, bottom), (right - w, bottom),
        (right, top), (left - w, top), (right, bottom - h), (left - w, bottom - h), (left + gap, top + gap),
    ]  # fmt: skip
    best, least = corners[0], math.inf
    for order, (x, y) in enumerate(corners):
        x = min(max(0.0, x), max(0.0, size[0] - w))
        y = min(max(0.0, y), max(0.0, size[1] - h))
        place = (x, y, x + w, y + h)
        cost = 4 * sum(_common(place, other) for other in taken) + _common(place, _ordered(box))
        cost += sum(_common(place, _ordered(other)) for other in others) + 1e-3 * order
        if cost < least:
            best, least = (x, y), cost
    return best[0], best[1], best[0] + w, best[1] + h


def _common(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _tag(pen: ImageDraw.ImageDraw, place: Box, text: str, font: ImageFont.FreeTypeFont, colour: Colour) -> None:
    red, green, blue = colour
    ink = _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else _PAPER
    pen.rectangle(place, fill=colour)
    pen.text((place[0] + 3, place[1] + 1), text, fill=ink, font=font)
