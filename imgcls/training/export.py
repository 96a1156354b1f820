"""A model as a file that runs without this project: stored pixels in, logits out, what stands between them inside."""

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from imgcls import storage
from imgcls.data.augment import inputs
from imgcls.data.order import permutation
from imgcls.errors import CheckpointError, RecipeError
from imgcls.recipe import Input
from imgcls.training.evaluate import opened
from imgcls.training.predict import load_network
from imgcls.training.weights import Model, preprocessing

OPSET = 20
DYNAMIC = {"images": {0: torch.export.Dim("batch")}}
NUM_COMPARED, AT_ONCE = 1000, 100
LARGEST = 1e-4
"""Of a logit's difference from the checkpoint's."""
FACTS = "imgcls.json"
"""In the file: class names, what makes pixels of an image, whose weights these are."""


class _WithInputs(nn.Module):
    def __init__(self, network: nn.Module, into: Input) -> None:
        super().__init__()
        self.network, self.into = network, into

    def forward(self, images: Tensor) -> Tensor:
        """images: uint8, (b, h, w, c). Returns logits, (b, classes)."""
        return self.network(inputs(images, self.into))


def export(source: Model, *, to: str, data_url: str) -> tuple[torch.Size, float]:
    """The model lies at `to`, a .onnx or .pt2; on test images it answers as the checkpoint does.

    Returns the shape of the images that were compared, (n, height, width, channels), and a logit's largest difference.
    Raises RecipeError for another ending, or without the packages for ONNX; DataError where the data do not fit;
    CheckpointError, before anything is written, where the answers differ.
    """
    write = {".onnx": _write_onnx, ".pt2": _write_pt2}.get(Path(to).suffix)
    if write is None:
        raise RecipeError(f"--to {to} is neither ONNX nor a PyTorch program\n  do: name a file that ends in .onnx or .pt2")
    if write is _write_onnx and not (find_spec("onnxscript") and find_spec("onnxruntime")):
        raise RecipeError(f"--to {to} needs onnxscript and onnxruntime\n  do: make setup, or end in .pt2")
    images = _test_images(source, data_url)
    module = _WithInputs(load_network(source), source.recipe.input).eval()
    facts = {
        "class_names": source.class_names,
        "preprocessing": preprocessing(source.recipe) | {"resize": "bilinear, by Pillow; then gray if there is one channel"},
        "input": "images: uint8, (batch, height, width, channels), as Pillow resizes the central square; the rest is inside",
        "output": "logits: float32, (batch, classes)",
        "weights_sha256": source.weights_sha256,
        "trained_on": [seen.entry.dataset for seen in source.lineage],
        "synthetic": source.synthetic,
    }
    with storage.temporary_folder("export") as folder, torch.no_grad():
        file = Path(folder) / f"model{Path(to).suffix}"
        program = torch.export.export(module, (images[:1].repeat(2, 1, 1, 1),), dynamic_shapes=DYNAMIC)
        answer = write(program, json.dumps(facts, indent=1), file)
        parts = (*images.split(AT_ONCE), images[:1])
        difference = float(np.max([np.abs(answer(part) - module(part).numpy()).max() for part in parts]))
        if not difference <= LARGEST:
            raise CheckpointError(
                f"{source.url} answers otherwise when exported: a logit differs by {difference:.2g}\n"
                "  do: export it in the other format, and report this"
            )
        storage.write_bytes(to, file.read_bytes())
    return images.shape, difference


def _test_images(source: Model, data_url: str) -> Tensor:
    """Some of the set that it was trained on, as the cache keeps them: uint8, (n, h, w, c)."""
    cache, splits = opened(source, data_url=data_url, split="test")
    drawn = np.sort(splits.test[permutation(0, 0, len(splits.test))[:NUM_COMPARED]])
    return torch.from_numpy(np.array(cache.images[drawn]))


Answer = Callable[[Tensor], np.ndarray]


def _write_pt2(program: ExportedProgram, facts: str, file: Path) -> Answer:
    torch.export.save(program, file, extra_files={FACTS: facts})
    loaded = torch.export.load(file).module()
    return lambda images: loaded(images).numpy()


def _write_onnx(program: ExportedProgram, facts: str, file: Path) -> Answer:
    import onnxruntime

    onnx = torch.onnx.export(
        program, opset_version=OPSET, input_names=["images"], output_names=["logits"], dynamic_shapes=DYNAMIC, verbose=False
    )
    assert onnx is not None
    onnx.model.metadata_props[FACTS] = facts
    onnx.save(file, external_data=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda images: np.asarray(session.run(["logits"], {"images": images.numpy()})[0])
