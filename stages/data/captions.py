"""A folder of images and the file that says what they show."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from espalier.stages.errors import Refusal

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
CAPTIONS = ("captions.jsonl", "metadata.jsonl", "captions.csv", "metadata.csv")
FILE_KEYS, TEXT_KEYS = ("file_name", "file"), ("text", "caption")


@dataclass(frozen=True, slots=True)
class Pair:
    """One image and what it shows."""

    path: Path
    text: str


def holds_images(source: object) -> bool:
    """Whether a calibration source is a folder of images: some with a caption file, or nothing but images."""
    if not isinstance(source, str | Path) or not (folder := Path(source).expanduser()).is_dir():
        return False
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]
    images = [path for path in files if path.suffix.lower() in SUFFIXES]
    return bool(images) and (len(images) == len(files) or any((folder / name).is_file() for name in CAPTIONS))


def read_pairs(folder: Path) -> list[Pair]:
    """The folder's images with their captions, in the order of its caption file.

    Raises Refusal for a caption file that is missing or wrong, an image without a caption, a caption without an image.
    """
    folder = folder.expanduser()
    file = next((folder / name for name in CAPTIONS if (folder / name).is_file()), None)
    if file is None:
        raise Refusal(
            f"calibration {folder}: images without captions; add captions.jsonl, a line for each image: "
            '{"file": "cat.png", "text": "A cat on a mat."}'
        )
    pairs = []
    for number, record in _records(file):
        where = f"calibration {file}, line {number}"
        name = next((record[key] for key in FILE_KEYS if record.get(key)), None)
        if name is None:
            raise Refusal(f'{where}: names no image; give "file" and "text"')
        text = next((record[key] for key in TEXT_KEYS if record.get(key)), "")
        if not isinstance(text, str) or not text.strip():
            raise Refusal(f"{where}: no caption for {name}; give its text, or take the image out")
        path = folder / str(name)
        if not path.is_file():
            raise Refusal(f"{where}: no such image {path}; take the line out, or add the image")
        pairs.append(Pair(path, text))
    captioned = {pair.path.resolve() for pair in pairs}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.resolve() not in captioned:
            raise Refusal(f"calibration {path}: no caption in {file.name}; add a line for it, or take the image out")
    return pairs


def find_images(folder: Path) -> list[Pair]:
    """The folder's images where captions are not read: in the order of its caption file, else of their names."""
    folder = folder.expanduser()
    if any((folder / name).is_file() for name in CAPTIONS):
        return read_pairs(folder)
    files = (path for path in sorted(folder.rglob("*")) if not path.name.startswith("."))
    return [Pair(path, "") for path in files if path.suffix.lower() in SUFFIXES]


def _records(file: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line number, record) of a JSON Lines or CSV file."""
    try:
        with file.open(encoding="utf-8", newline="") as handle:
            if file.suffix == ".csv":
                yield from enumerate(csv.DictReader(handle), start=2)
                return
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError(f"line {number} is no object")
                    yield number, record
    except (OSError, ValueError, csv.Error) as error:
        raise Refusal(f"calibration {file}: cannot be read ({error})") from None


def open_image(path: Path) -> Any:
    """The image in `path`, upright and in RGB. Raises Refusal if it cannot be read."""
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise Refusal("calibration on images needs Pillow; pip install pillow") from None
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Refusal(f"calibration {path}: not an image that can be read ({error}); replace it") from None
