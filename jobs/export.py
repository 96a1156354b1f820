"""A checkpoint as a file that runs without this project."""

from typing import Annotated

import tyro

from imgcls import storage
from jobs._door import DONE, enter
from jobs._request import place
from jobs._terminal import Lines


def export(
    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CHECKPOINT")],
    to: str,
    data: str = "data/packed",
    verbose: bool = False,
) -> int:
    """Export a checkpoint as ONNX or as a PyTorch program; it is compared with the checkpoint on test images first.

    Args:
        checkpoint: A run's folder, a checkpoint or a model file; a path or a URL.
        to: The file, a path or a URL: *.onnx or *.pt2.
        data: Folder or URL of packed sets.
        verbose: The exporters' own lines too, and tracebacks.
    """
    from cluster.carry.run import silence_libraries
    from imgcls.training.export import export as export_model
    from imgcls.training.weights import find_model

    checkpoint, to, data = place(checkpoint, "CHECKPOINT"), place(to, "--to"), place(data, "--data")
    storage.check_places(reads=[checkpoint, data], writes=[to.rpartition("/")[0]])
    silence_libraries(verbose)
    source = find_model(checkpoint)
    (num_compared, *shape), difference = export_model(source, to=to, data_url=data)
    lines = Lines(synthetic=source.synthetic)
    lines.say(f"{to}: images, uint8, (batch, {', '.join(map(str, shape))}) -> logits, float32")
    lines.say(f"on {num_compared:,} test images a logit differs from {source.url} by {difference:.1e} at most")
    return DONE


if __name__ == "__main__":
    enter(export)
