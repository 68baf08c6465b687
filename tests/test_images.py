"""Every image mode of practice decodes to what one sees; everything else is one clear error."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cl_adapters.errors import DataError
from cl_adapters.images import decode_image

RGB = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def encode(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG by hand, for headers that Pillow does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_path_bytes_and_pillow_image_agree(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        pixels = decode_image(source)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable
        np.testing.assert_array_equal(pixels, RGB)


def test_opened_image_is_left_open_and_unchanged() -> None:
    image = Image.fromarray(RGB).convert("L")
    decode_image(image)
    assert image.mode == "L"
    assert image.getpixel((0, 0)) is not None


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
def test_modes_become_rgb_of_same_size(mode: str) -> None:
    form = {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    pixels = decode_image(encode(Image.fromarray(RGB).convert(mode), form))
    assert pixels.shape == RGB.shape
    assert pixels.dtype == np.uint8


def test_grey_is_repeated() -> None:
    grey = RGB[..., 0]
    np.testing.assert_array_equal(decode_image(encode(Image.fromarray(grey))), np.repeat(grey[..., None], 3, axis=-1))


def test_palette_gives_its_colours() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert decode_image(encode(image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_cmyk_colours() -> None:
    image = Image.new("CMYK", (1, 1), (0, 255, 255, 0))
    assert decode_image(encode(image, "TIFF")).tolist() == [[[255, 0, 0]]]


def test_transparency_shows_white_not_the_hidden_colour() -> None:
    rgba = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], dtype=np.uint8)
    pixels = decode_image(encode(Image.fromarray(rgba)))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [255, 0, 0]
    assert abs(int(pixels[0, 2, 0]) - 127) <= 1


def test_transparent_palette_entry_shows_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putpixel((1, 0), 1)
    assert decode_image(encode(image, transparency=0)).tolist() == [[[255, 255, 255], [200, 100, 50]]]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(form: str) -> None:
    values = np.array([[0, 257, 1000, 32896, 65535]], dtype=np.uint16)
    pixels = decode_image(encode(Image.fromarray(values), form))
    assert pixels[0, :, 0].tolist() == [0, 1, 4, 128, 255]
    assert (pixels == pixels[..., :1]).all()


def test_16_bit_colour_is_scaled() -> None:
    row = b"\0" + struct.pack(">3H", 65535, 32896, 0)
    assert decode_image(png(1, 1, 16, 2, row)).tolist() == [[[255, 128, 0]]]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise for display
    pixels = decode_image(encode(Image.fromarray(RGB), exif=exif.tobytes()))
    np.testing.assert_array_equal(pixels, np.rot90(RGB, -1))


def test_animation_gives_first_frame() -> None:
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    content = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(content)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_unknown_value_range_is_refused(dtype: type) -> None:
    image = Image.fromarray(np.full((2, 2), 3, dtype=dtype))
    with pytest.raises(DataError, match=r"scan\.tif: .*no known value range; save it with 8 or 16 bits"):
        decode_image(encode(image, "TIFF"), name="scan.tif")


@pytest.mark.parametrize("content", [b"", b"hello, I am a text file", b"\x89PNG\r\n\x1a\nrubbish"])
def test_not_an_image(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.png"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"notes\.png: (not an image|damaged)"):
        decode_image(path)


def test_postscript_is_never_handed_to_ghostscript(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import EpsImagePlugin

    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", forbidden)
    with pytest.raises(DataError, match="not an image"):
        decode_image(encode(Image.fromarray(RGB), "EPS"))


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "TIFF"])
def test_truncated_file_is_an_error(form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = encode(Image.fromarray(noise), form)
    with pytest.raises(DataError, match=r"photo: (damaged image|not an image)"):
        decode_image(content[: len(content) // 2], name="photo")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        decode_image(tmp_path / "none.png")
    with pytest.raises(DataError, match="cannot be read as an image file"):
        decode_image(tmp_path)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 20_000])  # beyond Pillow's limit, and beyond twice of it
def test_decompression_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    with pytest.raises(DataError, match="bomb: more pixels than the limit"):
        decode_image(png(side, side, 8, 0, b"\0"), name="bomb")


def test_the_limit_can_be_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 34)
    with pytest.raises(DataError, match="more pixels than the limit of 34 "):
        decode_image(Image.fromarray(RGB))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    np.testing.assert_array_equal(decode_image(Image.fromarray(RGB)), RGB)
