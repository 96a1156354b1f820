"""Classes of single images by a checkpoint; a file that is no image is named and the rest goes on."""

import json as json_module
from pathlib import Path
from typing import Annotated

import tyro

from imgcls import storage
from imgcls.data.archives import printable
from imgcls.errors import RecipeError
from jobs._door import DONE, SOME_FAILED, enter
from jobs._terminal import Lines, stderr

TOP = 5


def predict(
    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")],
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")],
    json: bool = False,
    verbose: bool = False,
) -> int:
    """Predict the classes of images: the five most probable of each.

    Args:
        checkpoint: A run's folder, a checkpoint or a model.pt; a path or a URL.
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
    predictor = Predictor(found.model)
    answers: list[dict[str, object]] = []
    for image in images:
        try:
            top = predictor.top(image.read_bytes(), TOP)
            answers.append({"image": printable(image), "top": [{"class": name, "probability": p} for name, p in top]})
        except Exception as error:  # Pillow raises many kinds on what is no image
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            answers.append({"image": printable(image), "error": printable(reason)})
    synthetic = found.model.synthetic
    if json:
        print(
            json_module.dumps(
                {"checkpoint": found.url, "synthetic": synthetic, "predictions": answers}, indent=1, ensure_ascii=False
            )
        )
    else:
        _print(answers, Lines(synthetic=synthetic))
    failed = [answer for answer in answers if "error" in answer]
    for answer in failed:
        stderr(f"error: {answer['image']} cannot be used: {answer['error']}")
    return SOME_FAILED if failed else DONE


def _print(answers: list[dict[str, object]], lines: Lines) -> None:
    for answer in answers:
        top = answer.get("top")
        if isinstance(top, list):
            lines.say(f"{answer['image']}")
            for one in top:
                lines.say(f"  {one['probability']:7.2%}  {one['class']}")


if __name__ == "__main__":
    enter(predict)
