"""Classes of single images by a checkpoint; a file that is no image is named and the rest goes on."""

import json as json_module
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from imgcls import storage
from imgcls.data.archives import printable
from imgcls.errors import RecipeError
from jobs._door import DONE, SOME_FAILED, enter
from jobs._terminal import Lines, stderr

if TYPE_CHECKING:
    from imgcls.training.predict import Predictor

TOP = 5


def predict(
    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")],
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")],
    json: bool = False,
    verbose: bool = False,
) -> int:
    """Predict the classes of images: the five most probable of each.

    Args:
        checkpoint: A run's folder, a checkpoint or a model file; a path or a URL.
        images: Image files.
        json: Print one JSON object.
        verbose: Tracebacks too.
    """
    from imgcls.training.predict import Predictor
    from imgcls.training.weights import find_model

    if not images:
        raise RecipeError("name an IMAGE, or several")
    storage.check_places(reads=[storage.absolute(checkpoint)])
    found = find_model(storage.absolute(checkpoint))
    predictor, lines = Predictor(found.model), Lines(synthetic=found.model.synthetic)
    answers = [_answer(predictor, image) for image in images]
    failed = [answer for answer in answers if "error" in answer]
    if json:
        content = {"checkpoint": found.url, "synthetic": found.model.synthetic, "predictions": answers}
        print(json_module.dumps(content, indent=1, ensure_ascii=False))
    else:
        for answer in answers:
            _say_top(lines, answer)
    for answer in failed:
        stderr(f"error: {answer['image']} cannot be used: {answer['error']}")
    return SOME_FAILED if failed else DONE


def _say_top(lines: Lines, answer: Mapping[str, Any]) -> None:
    if "top" in answer:
        lines.say(answer["image"])
    for line in answer.get("top", ()):
        lines.say(f"  {line['probability']:7.2%}  {line['class']}")


def _answer(predictor: "Predictor", image: Path) -> dict[str, Any]:
    """Its most probable classes, or why it cannot be used."""
    try:
        top = predictor.top(image.read_bytes(), TOP)
    except Exception as error:  # Pillow raises many kinds on what is no image
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return {"image": printable(image), "error": printable(reason)}
    return {"image": printable(image), "top": [{"class": name, "probability": p} for name, p in top]}


if __name__ == "__main__":
    enter(predict)
