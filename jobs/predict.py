"""Classes of images by a checkpoint; a file that is no image is named and the rest goes on."""

import json as json_module
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from imgcls import storage
from imgcls.data.archives import printable
from imgcls.data.sources import images_below
from imgcls.errors import DataError, RecipeError, first_line
from jobs._door import DONE, SOME_FAILED, enter
from jobs._terminal import Lines, stderr

if TYPE_CHECKING:
    from imgcls.training.predict import Predictor

TOP, AT_ONCE = 5, 64


def predict(
    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")],
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")],
    json: bool = False,
    verbose: bool = False,
) -> int:
    """Predict the classes of images: the five most probable of each.

    Args:
        checkpoint: A run's folder, a checkpoint or a model file; a path or a URL.
        images: Image files; of a folder, all that are in it or below.
        json: Print a line of JSON for each image.
        verbose: Tracebacks too.
    """
    from imgcls.training.predict import Predictor
    from imgcls.training.weights import find_model

    if not images:
        raise RecipeError("name an IMAGE, or several")
    storage.check_places(reads=[storage.absolute(checkpoint)])
    found = find_model(storage.absolute(checkpoint))
    predictor, lines = Predictor(found), Lines(synthetic=found.synthetic)
    failed, files = False, _files(images)
    for answer in (answer for batch in iter(lambda: [*islice(files, AT_ONCE)], []) for answer in _answers(predictor, batch)):
        failed |= "error" in answer
        if json:
            print(json_module.dumps(answer | {"synthetic": found.synthetic}, ensure_ascii=False), flush=True)
        elif "top" in answer:
            lines.say(answer["image"])
            for line in answer["top"]:
                lines.say(f"  {line['probability']:7.2%}  {line['class']}")
        if "error" in answer:
            stderr(f"error: {answer['image']} cannot be used: {answer['error']}")
    return SOME_FAILED if failed else DONE


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    """Those that were named, and of folders all that may be images, by name."""
    for path in paths:
        below = list[Path]()
        with suppress(DataError):  # `_answers` says which
            below = images_below(path) if os.path.isdir(path) else []
        yield from below or [path]


def _answers(predictor: "Predictor", images: Sequence[Path]) -> list[dict[str, Any]]:
    """Of each its most probable classes, or why it cannot be used."""
    pixels, answers = {}, dict[Path, dict[str, Any]]()
    for image in images:
        try:
            if os.path.isdir(image):
                images_below(image)
                raise ValueError("the folder holds no images")
            pixels[image] = predictor.pixels(image.read_bytes())
        except Exception as error:  # Pillow raises many kinds on what is no image
            answers[image] = {"error": printable(getattr(error, "strerror", None) or first_line(error))}
    tops = predictor.top([*pixels.values()], TOP) if pixels else []
    for image, top in zip(pixels, tops, strict=True):
        answers[image] = {"top": [{"class": name, "probability": p} for name, p in top]}
    return [{"image": printable(image)} | answers[image] for image in images]


if __name__ == "__main__":
    enter(predict)
