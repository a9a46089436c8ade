"""Opening pictures: colour modes, depths, orientation, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from nearfield.engine.dense import decode
from nearfield.engine.errors import DataError
from PIL import Image
from torchvision import tv_tensors

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]  # as Pillow takes them
    return path


def test_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    image = decode.read_image(saved(tmp_path / "a.png", Image.fromarray(COLOURS)))
    assert isinstance(image, tv_tensors.Image)
    assert image.dtype == torch.uint8
    assert np.array_equal(image.permute(1, 2, 0).numpy(), COLOURS)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_every_colour_mode_becomes_the_one_that_is_wanted(tmp_path: Path, mode: str, channels: int) -> None:
    source = Image.fromarray(COLOURS).convert(mode)
    path = saved(tmp_path / "a.tif", source) if mode not in ("HSV", "YCbCr") else None
    if path is None:  # Pillow writes no TIFF of these that it reads: the conversion alone
        image = tv_tensors.Image(decode.as_mode(source, decode.MODES[channels]))
    else:
        image = decode.read_image(path, channels)
    assert image.shape == (channels, 5, 7)
    wanted = source.convert("RGB").convert("L") if mode != "1" else source.convert("L")
    gray = Image.fromarray(image[:3].permute(1, 2, 0).numpy().squeeze())
    assert np.abs(np.asarray(gray.convert("L"), int) - np.asarray(wanted, int)).max() <= 2
    if channels == 4 and mode not in ("LA", "RGBA"):
        assert (image[3] == 255).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 6 * 9).astype(np.uint16).reshape(6, 9)
    for name in ("a.png", "a.tif", "a.pgm"):
        path = saved(tmp_path / name, Image.fromarray(ramp))
        for channels in (1, 3):
            image = decode.read_image(path, channels)
            assert image.shape == (channels, 6, 9)
            assert np.abs(image.numpy() - ramp / 257).max() <= 1, name


def test_values_without_a_range_are_refused(tmp_path: Path) -> None:
    for values in (np.ones((3, 3), np.float32), np.full((3, 3), 70000, np.int32)):
        path = saved(tmp_path / "a.tif", Image.fromarray(values))
        with pytest.raises(DataError, match=r"a\.tif: cannot read this image .*8 or 16 bits"):
            decode.read_image(path)


def test_transparency_is_kept_with_four_channels_and_dropped_otherwise(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    alpha = RNG.integers(0, 256, (5, 7, 1), dtype=np.uint8)
    path = saved(tmp_path / "a.png", Image.fromarray(np.concatenate([COLOURS, alpha], 2)))
    assert np.array_equal(decode.read_image(path, 4)[3].numpy(), alpha[..., 0])
    assert np.array_equal(decode.read_image(path).permute(1, 2, 0).numpy(), COLOURS)
    palette = Image.fromarray(COLOURS).quantize(8)
    path = saved(tmp_path / "p.png", palette, transparency=bytes(range(0, 80, 10)))
    assert decode.read_image(path, 4)[3].unique().numel() > 1
    assert np.array_equal(decode.read_image(path).permute(1, 2, 0).numpy(), np.asarray(palette.convert("RGB")))
    assert not list(recwarn)  # Pillow warns about palettes with transparent bytes


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(tmp_path: Path, orientation: int) -> None:
    stored = {
        1: COLOURS,
        2: COLOURS[:, ::-1],
        3: COLOURS[::-1, ::-1],
        4: COLOURS[::-1],
        5: COLOURS.swapaxes(0, 1),
        6: np.rot90(COLOURS, 1),
        7: COLOURS.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(COLOURS, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(decode.read_image(path).permute(1, 2, 0).numpy(), COLOURS)
    assert np.array_equal(decode.read_image(path, upright=False).permute(1, 2, 0).numpy(), stored)


def test_sixteen_bit_pictures_are_turned_too(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 6 * 9).astype(np.uint16).reshape(6, 9)
    exif = Image.Exif()
    exif[0x0112] = 3
    image = decode.read_image(saved(tmp_path / "a.png", Image.fromarray(ramp), exif=exif), 1)
    assert np.array_equal(image[0].numpy(), (ramp >> 8)[::-1, ::-1])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_broken_exif_block_does_not_make_a_picture_unreadable(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.fromarray(COLOURS), exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff")
    assert decode.read_image(path).shape == (3, 5, 7)


def test_a_picture_of_one_pixel_is_a_picture(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", Image.new("L", (1, 1), 200))
    assert decode.read_image(path).flatten().tolist() == [200, 200, 200]


def test_of_a_moving_picture_the_first_frame_is_read(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    assert decode.read_image(path)[:, 0, 0].tolist() == [255, 0, 0]


def test_what_cannot_be_read_is_named_in_one_line(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.jpg", Image.fromarray(COLOURS).resize((90, 90))).read_bytes()
    broken = {"cut.jpg": whole[: len(whole) // 2], "empty.png": b"", "text.jpg": b"not a picture"}
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}: cannot read this image \(.+\): repair or remove it") as caught:
            decode.read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"none\.png: no such file"):
        decode.read_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot read this image"):
        decode.read_image(tmp_path)
    with pytest.raises(ValueError, match="channels=2: pictures have 1, 3 or 4"):
        decode.read_image(tmp_path / "a.jpg", 2)
