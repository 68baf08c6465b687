"""Characters rendered from the fonts that matplotlib ships: masks, random styles, nothing downloaded.

A glyph is first drawn once, upright and centred, as a mask of 64 x 64 (kept in memory). A sample is that mask made
thicker or thinner, put through one random affine map, and painted in a random ink on a random ground with noise.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter, ImageFont

from cl_adapters.config import check_range

CANVAS = 64
INK = 44
"""Longer side of the ink on the canvas, in pixels: all glyphs fill their box alike, as segmented characters do."""

TRAIN_FACES = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Oblique",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-BoldItalic",
)
TEST_FACES = ("DejaVuSans-Oblique", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "DejaVuSerif-Italic")
STIX_FACES = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta")
CM_FACES = ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10")


@dataclass(frozen=True, kw_only=True)
class Style:
    """How much samples of one glyph differ; each range is drawn from uniformly.

    Attributes:
        degrees: largest rotation each way.
        scale: size factor, drawn evenly in its logarithm, for each axis a little differently (``stretch``).
        stretch: largest relative difference between the axes.
        shear: largest horizontal shear (tangent).
        shift: largest shift each way, as a fraction of the image side.
        thickness: change of the stroke; -1 is as thin as it gets, +1 as thick.
        contrast: difference between ink and ground, of 255.
        dark_ink: probability of dark ink on a bright ground.
        tint: largest difference of one colour channel from grey, of 255.
        gradient: largest change of brightness from one side of the ground to the other, of 255.
        noise: standard deviation of the pixel noise, of 255.
    """

    degrees: float = 15.0
    scale: tuple[float, float] = (0.75, 1.15)
    stretch: float = 0.2
    shear: float = 0.25
    shift: float = 0.1
    thickness: tuple[float, float] = (-0.7, 0.7)
    contrast: tuple[float, float] = (70.0, 255.0)
    dark_ink: float = 0.5
    tint: float = 20.0
    gradient: float = 40.0
    noise: tuple[float, float] = (0.0, 20.0)

    def __post_init__(self) -> None:
        check_range(self, "[0, 360]", "degrees")
        check_range(self, "[0, 1)", "stretch")
        check_range(self, "[0, 10]", "shear", "shift")
        check_range(self, "[0, 1]", "dark_ink")
        check_range(self, "[0, 255]", "tint", "gradient")
        bounds = {"scale": (0.01, 100.0), "thickness": (-1.0, 1.0), "contrast": (0.0, 255.0), "noise": (0.0, 255.0)}
        for name, (lowest, highest) in bounds.items():
            low, high = getattr(self, name)
            if not lowest <= low <= high <= highest:
                raise ValueError(f"{name} must be two ascending numbers in [{lowest}, {highest}], got {[low, high]}")

    def towards(self, other: Style, share: float) -> Style:
        """Return a style ``share`` (0 to 1) of the way from this one to ``other``."""

        def mix(a: Any, b: Any) -> Any:
            return tuple(map(mix, a, b)) if isinstance(a, tuple) else a + share * (b - a)

        names = [entry.name for entry in fields(self)]
        return Style(**{name: mix(getattr(self, name), getattr(other, name)) for name in names})


@functools.cache
def font_path(face: str) -> Path:
    """Return the file of a face that the installed matplotlib carries.

    Raises:
        FileNotFoundError: this matplotlib does not carry it.
    """
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"
    if not path.is_file():
        raise FileNotFoundError(f"matplotlib {matplotlib.__version__} does not carry the font {face} ({path})")
    return path


@functools.cache
def coverage(face: str) -> frozenset[int]:
    """Return the code points for which ``face`` has a glyph."""
    from fontTools.ttLib import TTFont

    with TTFont(font_path(face), lazy=True) as font:
        return frozenset(font.getBestCmap() or {})


@functools.lru_cache(maxsize=64)
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    # The basic layout: the other one is only there where libraqm is, and would shape some scripts differently.
    return ImageFont.truetype(font_path(face), size, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=65536)
def glyph_mask(codepoint: int, face: str) -> bytes:
    """Draw one glyph upright and centred, its longer side ``INK`` pixels.

    Returns:
        CANVAS * CANVAS bytes, row by row, 255 = ink; all zero where the glyph has no ink.
    """
    canvas = Image.new("L", (CANVAS, CANVAS))
    core, _ = _font(face, 2 * CANVAS).getmask2(chr(codepoint), mode="L")
    width, height = core.size
    if width and height:
        drawn = Image.new("L", (width, height))
        drawn.im.paste(core, (0, 0, width, height))
        box = drawn.getbbox()
        if box is not None:
            ink = drawn.crop(box)
            factor = INK / max(ink.size)
            wide, high = (max(1, round(side * factor)) for side in ink.size)
            ink = ink.resize((wide, high), Image.Resampling.BOX)
            canvas.paste(ink, ((CANVAS - wide) // 2, (CANVAS - high) // 2))
    return canvas.tobytes()


def render(
    codepoint: int, face: str, rng: np.random.Generator, size: int = 32, style: Style | None = None
) -> npt.NDArray[np.uint8]:
    """Draw one random sample of a glyph.

    Args:
        codepoint: Unicode code point; the face must cover it.
        face: name of a font file of matplotlib, without its suffix.
        rng: the only source of randomness; the same state gives the same bytes.
        size: side of the image in pixels.
        style: ranges of the random changes; None for the defaults.

    Returns:
        uint8 [size, size, 3].
    """
    style = style or Style()
    mask = Image.frombytes("L", (CANVAS, CANVAS), glyph_mask(codepoint, face))
    mask = _change_thickness(mask, rng.uniform(*style.thickness))
    warped = mask.transform(
        (size, size), Image.Transform.AFFINE, _inverse_map(rng, size, style), Image.Resampling.BILINEAR
    )
    alpha = np.asarray(warped, dtype=np.float32)[..., None] / 255.0
    return _paint(alpha, rng, style)


def _change_thickness(mask: Image.Image, amount: float) -> Image.Image:
    """Blur, then move the threshold: an even erosion (amount < 0) or dilation (> 0) with soft edges."""
    threshold = 127.5 * (1.0 - 0.75 * amount)
    table = [min(255, max(0, round(127.5 + 3.0 * (level - threshold)))) for level in range(256)]
    return mask.filter(ImageFilter.BoxBlur(1.6)).point(table)


def _inverse_map(rng: np.random.Generator, size: int, style: Style) -> tuple[float, float, float, float, float, float]:
    """Return the affine map from output to canvas pixels, as Pillow wants it."""
    angle = math.radians(rng.uniform(-style.degrees, style.degrees))
    factor = math.exp(rng.uniform(math.log(style.scale[0]), math.log(style.scale[1])))
    stretch = math.exp(rng.uniform(-style.stretch, style.stretch) / 2)
    shear = rng.uniform(-style.shear, style.shear)
    dx, dy = rng.uniform(-style.shift, style.shift, size=2) * size
    cos, sin = math.cos(angle), math.sin(angle)
    per_pixel = CANVAS / size / factor
    across, down = per_pixel / stretch, per_pixel * stretch
    a, b = across * (cos + shear * sin), across * (sin - shear * cos)
    d, e = -down * sin, down * cos
    middle = size / 2
    x, y = middle + float(dx), middle + float(dy)
    return a, b, CANVAS / 2 - a * x - b * y, d, e, CANVAS / 2 - d * x - e * y


def _paint(alpha: npt.NDArray[np.float32], rng: np.random.Generator, style: Style) -> npt.NDArray[np.uint8]:
    """Mix ink and ground; alpha float32 [H, W, 1] in 0..1, result uint8 [H, W, 3]."""
    side = alpha.shape[0]
    contrast = rng.uniform(*style.contrast)
    low = rng.uniform(0.0, 255.0 - contrast)
    levels = (low, low + contrast) if rng.random() < style.dark_ink else (low + contrast, low)
    ink, ground = (level + rng.uniform(-style.tint, style.tint, size=3) for level in levels)
    slope = rng.uniform(-style.gradient, style.gradient, size=2)
    steps = np.linspace(-0.5, 0.5, side)
    plane = (slope[0] * steps[:, None] + slope[1] * steps[None, :])[..., None]
    noise = rng.standard_normal((side, side, 1), dtype=np.float32) * rng.uniform(*style.noise)
    image = ground + plane + alpha * (ink - ground - plane) + noise
    return np.asarray(np.clip(np.rint(image), 0, 255), dtype=np.uint8)
