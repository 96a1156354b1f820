"""A model as a file that runs without this project: stored pixels in, logits out, what stands between them inside."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from imgcls import storage
from imgcls.data.augment import inputs
from imgcls.data.cache import open_cache
from imgcls.data.order import permutation
from imgcls.data.splits import split_ids
from imgcls.errors import CheckpointError, RecipeError
from imgcls.recipe import Input
from imgcls.training.evaluate import manifest_for
from imgcls.training.predict import load_network
from imgcls.training.weights import FoundModel, preprocessing

OPSET = 20
DYNAMIC = {"images": {0: torch.export.Dim("batch")}}
NUM_COMPARED, AT_ONCE = 1000, 100
LARGEST = 1e-4
"""Of a logit's difference from the checkpoint's."""
FACTS = "imgcls.json"
"""In the file: class names, what makes pixels of an image, whose weights these are."""


@dataclass(frozen=True, slots=True)
class Export:
    shape: tuple[int, ...]
    """Of an input: height, width, channels."""
    num_compared: int
    difference: float
    """The largest of any logit."""


class _WithInputs(nn.Module):
    def __init__(self, network: nn.Module, into: Input) -> None:
        super().__init__()
        self.network, self.into = network, into

    def forward(self, images: Tensor) -> Tensor:
        """images: uint8, (b, h, w, c). Returns logits, (b, classes)."""
        return self.network(inputs(images, self.into))


def export(source: FoundModel, *, to: str, data_url: str) -> Export:
    """The model lies at `to`, a .onnx or .pt2; on test images it answers as the checkpoint does.

    Raises RecipeError for another ending, or without the packages for ONNX; DataError where the data do not fit;
    CheckpointError, before anything is written, where the answers differ.
    """
    write = {".onnx": _write_onnx, ".pt2": _write_pt2}.get(Path(to).suffix)
    if write is None:
        raise RecipeError(f"--to {to} is neither ONNX nor a PyTorch program\n  do: name a file that ends in .onnx or .pt2")
    if write is _write_onnx and not (find_spec("onnxscript") and find_spec("onnxruntime")):
        raise RecipeError(f"--to {to} needs onnxscript and onnxruntime\n  do: make setup, or end in .pt2")
    images = _test_images(source, data_url)
    model = source.model
    module = _WithInputs(load_network(model), model.recipe.input).eval()
    facts = {
        "class_names": model.class_names,
        "preprocessing": preprocessing(model.recipe) | {"resize": "bilinear, by Pillow; then gray if there is one channel"},
        "input": "images: uint8, (batch, height, width, channels), as Pillow resizes the central square; the rest is inside",
        "output": "logits: float32, (batch, classes)",
        "weights_sha256": model.weights_sha256,
        "trained_on": [seen.entry.dataset for seen in model.lineage],
        "synthetic": model.synthetic,
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
    return Export(tuple(images.shape[1:]), len(images), difference)


def _test_images(source: FoundModel, data_url: str) -> Tensor:
    """Some of the set that it was trained on, as the cache keeps them: uint8, (n, h, w, c)."""
    recipe, manifest = source.model.recipe, manifest_for(source, data_url=data_url, split="test")
    px, channels = recipe.input.stored_px, recipe.input.channels
    cache = open_cache(storage.join(data_url, recipe.dataset), manifest, px=px, channels=channels)
    ids = split_ids(recipe, manifest).test
    drawn = np.sort(ids[permutation(0, 0, len(ids))[:NUM_COMPARED]])
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
