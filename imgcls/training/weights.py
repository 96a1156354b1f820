"""The portable `model.pt`, digests of weights, and the check that a source never saw the target's images."""

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imgcls import storage
from imgcls.errors import CheckpointError
from imgcls.recipe import Recipe, digest_of, recipe_from_json
from imgcls.records import LineageEntry

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Seen:
    """A data set that weights were trained on."""

    entry: LineageEntry
    pixels: np.ndarray
    """8 bytes of each image's pixel SHA-256: uint64, sorted."""


@dataclass(frozen=True, slots=True)
class Model:
    """What `model.pt` holds: enough to predict, and to know where it comes from."""

    recipe: Recipe
    class_names: tuple[str, ...]
    weights: dict[str, Tensor]
    lineage: tuple[Seen, ...]
    synthetic: bool

    @property
    def weights_sha256(self) -> str:
        return weights_sha256(self.weights)


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 over the tensors by sorted name: name, dtype, shape, bytes."""
    facts = []
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        data = storage.sha256(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
        facts.append([name, str(tensor.dtype), list(tensor.shape), data])
    return digest_of(facts)


def save_model(model: Model, url: str) -> str:
    """`model` lies at `url` and was read back; returns the SHA-256 of its weights."""
    about = {
        "format": FORMAT,
        "recipe": model.recipe.to_json(),
        "class_names": list(model.class_names),
        "preprocessing": _preprocessing(model.recipe),
        "synthetic": model.synthetic,
        "lineage": [seen.entry.model_dump() for seen in model.lineage],
        "weights_sha256": model.weights_sha256,
    }
    content = {
        "about": json.dumps(about),
        "weights": {name: tensor.detach().cpu().contiguous() for name, tensor in model.weights.items()},
        "lineage_pixels": [torch.from_numpy(seen.pixels.view(np.int64).copy()) for seen in model.lineage],
    }
    file = io.BytesIO()
    torch.save(content, file)
    storage.write_bytes(url, file.getvalue())
    return load_model(url).weights_sha256


def load_model(url: str) -> Model:
    """A checked `model.pt`. Raises CheckpointError where it is none, or its weights have another SHA-256."""
    content = load_tensors(storage.read_bytes(url), where=url)
    try:
        about: dict[str, Any] = json.loads(content["about"])
        if about["format"] != FORMAT:
            raise CheckpointError(f"{url} has format {about['format']}, this version reads {FORMAT}")
        lineage = tuple(
            Seen(LineageEntry.model_validate(entry), pixels.numpy().view(np.uint64))
            for entry, pixels in zip(about["lineage"], content["lineage_pixels"], strict=True)
        )
        model = Model(
            recipe=recipe_from_json(about["recipe"], where=url),
            class_names=tuple(about["class_names"]),
            weights=dict(content["weights"]),
            lineage=lineage,
            synthetic=about["synthetic"],
        )
        expected = about["weights_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{url} is not a model.pt of this system: {error}") from None
    found = model.weights_sha256
    if found != expected:
        raise CheckpointError(f"{url}: the weights' SHA-256 is {found[:12]}.., it says {expected[:12]}..: it was altered")
    return model


def load_tensors(data: bytes, *, where: str) -> dict[str, Any]:
    """Tensors and plain values, nothing that runs code. Raises CheckpointError."""
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on damaged files
        raise CheckpointError(f"{where} cannot be read as a checkpoint: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{where} holds no checkpoint")
    return content


def _preprocessing(recipe: Recipe) -> dict[str, Any]:
    into = recipe.input
    return {
        "crop": "central square",
        "stored_px": into.stored_px,
        "px": into.px,
        "channels": into.channels,
        "scale": 1 / 255,
        "mean": into.mean,
        "std": into.std,
    }


def refuse_seen_images(lineage: tuple[Seen, ...], *, source: str, dataset: str, pixels: np.ndarray) -> None:
    """No ancestor of `source` saw the data set or one of its images, else it is no transfer. Raises CheckpointError."""
    for seen in lineage:
        shared = np.isin(pixels, seen.pixels).sum()
        if seen.entry.dataset == dataset or shared:
            raise CheckpointError(
                f"{source} is no source for {dataset}: its lineage saw {seen.entry.dataset} (run {seen.entry.run}), "
                f"which shares {shared:,} of {len(pixels):,} images\n"
                "  do: start from weights that never saw them, or train from scratch"
            )


