"""Decoding image files: any mode that occurs in practice to uint8 RGB, and one clear error for the rest.

Rules, the same for training data and for ``predict``:

* grey, palette, CMYK, YCbCr: converted to RGB;
* transparency: composed onto white, so that hidden colours under transparent pixels never count;
* 16 bit grey: scaled to 8 bit (Pillow's own conversion would clip everything above 255 to white);
* EXIF orientation: applied;
* animations and multi-page files: the first frame;
* float or 32-bit images of unknown range: refused, because any scaling would be a guess.
"""

from __future__ import annotations

import functools
import io
import os

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from cl_adapters.errors import DataError

ImageSource = str | os.PathLike[str] | bytes | Image.Image

# Left out on purpose: EPS, which Pillow hands to an external Ghostscript, and TGA, which has no magic number,
# so that other files pass for it.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")


def decode_image(source: ImageSource, name: str | None = None) -> npt.NDArray[np.uint8]:
    """Decode one image to RGB.

    Args:
        source: a file's path, the bytes of a file, or an opened Pillow image (left as it is, not closed).
        name: how messages call it; a path names itself.

    Returns:
        uint8 [H, W, 3], a fresh C-contiguous array.

    Raises:
        DataError: no such file, not an image, truncated, of unknown value range, or with more pixels than
            ``PIL.Image.MAX_IMAGE_PIXELS``.
    """
    if name is None:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else "image"
    try:
        if isinstance(source, Image.Image):
            return _to_rgb(source, name)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_formats()) as image:
            return _to_rgb(image, name)
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: no such file") from error
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(f"{name}: cannot be read as an image file: {error.strerror}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(_too_large(name)) from error
    except UnidentifiedImageError as error:
        raise DataError(
            f"{name}: not an image, or of a format that is not read (read: {', '.join(_formats())})"
        ) from error
    except Exception as error:  # Pillow's plug-ins raise nearly anything on damaged bytes
        raise DataError(f"{name}: damaged image ({type(error).__name__}: {error})") from error


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(known for known in FORMATS if known in Image.OPEN)


def _to_rgb(image: Image.Image, name: str) -> npt.NDArray[np.uint8]:
    limit = Image.MAX_IMAGE_PIXELS
    # Pillow itself only warns up to twice its limit, and warning filters are not ours to change.
    if limit is not None and image.width * image.height > limit:
        raise DataError(_too_large(name))
    # PNG and PPM say that mode "I" holds 16-bit values; elsewhere it may hold anything.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise DataError(
            f"{name}: {image.mode!r} images (float or 32 bit) have no known value range; save it with 8 or 16 bits"
        )
    image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(np.asarray(image))
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        image = Image.new("RGBA", colour.size, "white")
        image.alpha_composite(colour)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def _from_16_bit(values: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    grey = ((values.astype(np.int64).clip(0, 65535) + 128) // 257).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def _too_large(name: str) -> str:
    return (
        f"{name}: more pixels than the limit of {Image.MAX_IMAGE_PIXELS:,} (a guard against decompression bombs); "
        "shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
    )
