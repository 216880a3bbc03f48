"""Rendered product labels: pictures of a brand, a quantity and its unit, and a CSV that says what each shows.

Deterministic: picture `index` of seed `seed` is a function of the two, whatever else is rendered.
"""

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from espalier.stages.storage.files import replacing

TABLE = "quantities.csv"
UNITS = ("ml", "cl", "g", "kg", "oz", "pcs")
SYLLABLES = ("ba", "cor", "del", "fi", "gra", "ki", "lo", "mar", "nu", "pel", "ro", "sol", "ta", "vi", "za")
# What packages hold, as a rule: so that a model of a few million parameters learns to read them in minutes.
QUANTITIES = (
    *(5, 8, 10, 12, 16, 20, 24, 30, 33, 40, 50, 60, 75, 80, 100, 125, 150),
    *(175, 200, 225, 250, 300, 330, 355, 375, 400, 450, 500, 600, 700, 750, 900),
)
FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
)
ROTATION_DEGREES = 6.0
NOISE = 12.0  # at most this standard deviation, in levels of 255


@dataclass(frozen=True, slots=True)
class Label:
    """What a picture says."""

    brand: str
    quantity: int
    unit: str


@cache
def _font(face: str, size: int) -> ImageFont.FreeTypeFont:
    """A face that Matplotlib ships, so that every machine renders alike."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{face}.ttf"), size)


def label(seed: int, index: int) -> Label:
    """What picture `index` says: every quantity, and every unit, equally often."""
    source = np.random.default_rng((seed, index, 0))
    brand = "".join(source.choice(SYLLABLES, size=int(source.integers(2, 4)))).capitalize()
    return Label(brand, int(source.choice(QUANTITIES)), str(source.choice(UNITS)))


def picture(seed: int, index: int, side: int = 48) -> Image.Image:
    """Picture `index`, RGB, square: brand above, quantity large in the middle, unit below; tilted, with noise."""
    said, source = label(seed, index), np.random.default_rng((seed, index, 1))
    paper, ink = _colours(source)
    image = Image.new("RGB", (side, side), paper)
    pen, face = ImageDraw.Draw(image), str(source.choice(FACES))
    band = source.random() < 0.5  # behind the brand, as labels have
    if band:
        pen.rectangle((0, 0, side, side * 0.28), fill=ink)
    pen.text((side / 2, side * 0.15), said.brand, paper if band else ink, _font(face, round(side * 0.17)), anchor="mm")
    for text, height, largest in ((str(said.quantity), 0.54, 0.46), (said.unit, 0.86, 0.24)):
        size = round(side * source.uniform(0.75, 1) * largest)
        while (width := _font(face, size).getlength(text)) > 0.86 * side:
            size -= 1
        aside = source.uniform(-0.5, 0.5) * min(side - width, 0.3 * side)
        pen.text((side / 2 + aside, side * height), text, ink, _font(face, size), anchor="mm")
    angle = source.uniform(-ROTATION_DEGREES, ROTATION_DEGREES)
    turned = image.rotate(angle, Image.Resampling.BILINEAR, fillcolor=paper)
    noise = source.normal(0, source.uniform(0, NOISE), (side, side, 3))
    return Image.fromarray(np.clip(np.asarray(turned, np.float32) + noise, 0, 255).astype(np.uint8))


def render(folder: Path, pictures: int, side: int, seed: int) -> Path:
    """A folder of so many pictures, and TABLE with a line for each: file, quantity, unit.

    The table is written last, in one step: where it is, all is there, and nothing is rendered again.
    """
    table = folder / TABLE
    if table.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(table) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("file", "quantity", "unit"))
        for index in range(pictures):
            said, name = label(seed, index), f"{index:06d}.png"
            picture(seed, index, side).save(folder / name, compress_level=1)
            writer.writerow((name, said.quantity, said.unit))
    return folder


def _colours(source: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A light paper and a dark ink, both tinted."""
    paper, ink = source.integers(190, 256, 3), source.integers(0, 90, 3)
    return tuple(int(level) for level in paper), tuple(int(level) for level in ink)
