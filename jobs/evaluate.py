"""Exact scores of a checkpoint on a split, at any number of workers."""

from typing import Annotated

import tyro

from imgcls import storage
from imgcls.records import Split
from jobs._door import DONE, enter
from jobs._request import place
from jobs._terminal import Lines


def evaluate(
    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")],
    data: str = "data/packed",
    split: Split = "test",
    num_workers: int = 1,
    json: bool = False,
    verbose: bool = False,
) -> int:
    """Evaluate a checkpoint: each sample of the split is counted once.

    Args:
        checkpoint: A run's folder, a checkpoint or a model file; a path or a URL.
        data: Folder or URL of packed sets.
        split: train and val are cut as the checkpoint's recipe says.
        num_workers: Two or more share the split under Ray.
        json: Print the scores as JSON.
        verbose: Ray's and Lightning's own lines too, and tracebacks.
    """
    from cluster.carry.evaluation import evaluate_checkpoint

    checkpoint, data = place(checkpoint, "CHECKPOINT"), place(data, "--data")
    storage.check_places(reads=[checkpoint, data])
    result = evaluate_checkpoint(checkpoint, data_url=data, split=split, num_workers=num_workers, verbose=verbose)
    lines, scores = Lines(synthetic=result.synthetic and not json), result.scores
    if json:
        lines.say(result.model_dump_json(indent=1))
        return DONE
    if result.data_digest != result.trained_on:
        lines.say(f"note: these data have digest {result.data_digest[:12]}, it was trained on {result.trained_on[:12]}")
    lines.say(
        f"{result.dataset} {split}: {scores.num_samples:,} samples, accuracy {scores.accuracy:.6f}, loss {scores.loss:.6f}"
    )
    lines.say("rows are labels, columns predictions, in the same order:")
    for name, row in zip(result.class_names, scores.confusion, strict=True):
        lines.say(f"  {name.ljust(max(map(len, result.class_names)))}  {' '.join(f'{count:5d}' for count in row)}")
    return DONE


if __name__ == "__main__":
    enter(evaluate)
