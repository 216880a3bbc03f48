"""A folder of images -> one memory-mapped Arrow file of what a vision tower looks at, to calibrate on.

The checkpoint's own image processor makes the pixels. A sample is an image; captions are not looked at, so a folder
may do without.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from espalier.stages.data.captions import Pair, find_images, open_image
from espalier.stages.data.image_samples import plain
from espalier.stages.data.image_table import ImageTable, choose, write_table
from espalier.stages.errors import Refusal
from espalier.stages.loading.vision import VisionSkeleton


def build_pixel_table(
    source: str | Path, processor: Any, model: VisionSkeleton, *, length: int, samples: int, seed: int, path: Path
) -> ImageTable:
    """The table of `samples` images of the folder `source`, of at most `length` patches, written in one step.

    They are chosen as for a language tower. Raises Refusal for a folder or an image that will not do.
    """
    images = find_images(Path(source))
    chosen = choose(len(images), samples, seed, f"calibration {source}: {len(images)} images")

    def made() -> Iterator[tuple[Pair, dict[str, np.ndarray]]]:
        for image in (images[index] for index in chosen):
            given = processor.image_processor(images=[open_image(image.path)], return_tensors="pt")
            inputs = {name: plain(values) for name, values in model.seen(given).items()}
            _check(inputs, model, length, image.path)
            yield image, inputs

    return write_table(path, made(), length, str(source))


def _check(inputs: dict[str, np.ndarray], model: VisionSkeleton, length: int, image: Path) -> None:
    taken = inputs["pixel_values"].shape
    if model.layout.packed:
        if taken[0] > length:
            raise Refusal(
                f"calibration {image}: makes {taken[0]} patches, more than length {length}; give --length {taken[0]} "
                "or more, or smaller images"
            )
    elif taken[1:] != model.image_shape:
        raise Refusal(
            f"calibration {image}: the processor makes it {taken[1:]}, the vision tower takes {model.image_shape}; "
            "this processor and this model do not belong together"
        )
