"""Models as they are stored: the portable model file, what a committed checkpoint holds, and digests of weights.

Lightning, whose import takes seconds, is not needed to read them.
"""

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imgcls import storage
from imgcls.errors import CheckpointError, DataError, MissingError
from imgcls.recipe import Recipe, digest_of, recipe_from_json
from imgcls.records import LineageEntry, RunConfig
from imgcls.runs import CheckpointFolder, RunFolder
from imgcls.training.lineage import Seen

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Model:
    """What a model file holds: enough to predict, and to know where it comes from."""

    url: str
    recipe: Recipe
    class_names: tuple[str, ...]
    weights: dict[str, Tensor]
    lineage: tuple[Seen, ...]
    synthetic: bool

    @property
    def data_digest(self) -> str:
        """Of the set that it was trained on."""
        return self.lineage[-1].entry.digest

    @property
    def weights_sha256(self) -> str:
        return weights_sha256(self.weights)


def weights_sha256(weights: dict[str, Tensor]) -> str:
    """SHA-256 over the tensors by sorted name: name, dtype, shape, bytes."""
    facts = []
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        data = storage.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data)
        facts.append([name, str(tensor.dtype), list(tensor.shape), data])
    return digest_of(facts)


def save_model(model: Model) -> str:
    """`model` lies at its URL and was read back; returns the file's SHA-256."""
    content = about(model)
    content["weights"] = {name: tensor.detach().cpu().contiguous() for name, tensor in model.weights.items()}
    content |= _digests(content)
    torch.save(content, file := io.BytesIO())
    data = file.getvalue()
    storage.write_bytes(model.url, data)
    digest = storage.sha256(data)
    storage.read_checked(model.url, num_bytes=len(data), digest=digest)
    return digest


@storage.fetched_again(CheckpointError)
def load_model(url: str) -> Model:
    """A checked model file. Raises CheckpointError where it is none, or is another than was written."""
    data = storage.read_bytes(url, num_bytes=0 if storage.is_local(url) else storage.num_bytes_of(url))
    content = load_tensors(data, where=url)
    model = model_of(content, content.get("weights"), where=url)
    digests = [(actual, content.get(name), "it") for name, actual in _digests(content).items()]
    result = RunFolder(url.rpartition("/")[0]).result()
    if result is not None and result.model_sha256:
        digests.append((storage.sha256(data), result.model_sha256, f"the {RunFolder.RESULT} beside it"))
    for actual, expected, who in digests:
        if actual != expected:
            raise CheckpointError(f"{url} was altered: SHA-256 is {actual[:12]}.., {who} says {str(expected)[:12]}..")
    return model


def _digests(content: dict[str, Any]) -> dict[str, str]:
    """Of a model file's content, as it holds them."""
    pixels = [storage.sha256(one.numpy().tobytes()) for one in content["lineage_pixels"]]
    about_sha256 = digest_of([content["about"], pixels])
    return {"weights_sha256": weights_sha256(content["weights"]), "about_sha256": about_sha256}


def about(model: Model) -> dict[str, Any]:
    """All of a model but its weights: what a model file and every checkpoint carry."""
    facts = {
        "format": FORMAT,
        "recipe": model.recipe.to_json(),
        "class_names": list(model.class_names),
        "preprocessing": preprocessing(model.recipe),
        "synthetic": model.synthetic,
        "lineage": [seen.entry.model_dump() for seen in model.lineage],
    }
    pixels = [torch.from_numpy(seen.pixels.view(np.int64).copy()) for seen in model.lineage]
    return {"about": json.dumps(facts), "lineage_pixels": pixels}


def model_of(content: dict[str, Any], weights: Any, *, where: str) -> Model:
    """The model that `content`, made by `about`, tells of. Raises CheckpointError."""
    try:
        facts: dict[str, Any] = json.loads(content["about"])
        if facts["format"] != FORMAT:
            raise CheckpointError(f"{where} has format {facts['format']}, this version reads {FORMAT}")
        lineage = tuple(
            Seen(LineageEntry.model_validate(entry), pixels.numpy().view(np.uint64))
            for entry, pixels in zip(facts["lineage"], content["lineage_pixels"], strict=True)
        )
        recipe = recipe_from_json(facts["recipe"], where=where)
        return Model(where, recipe, tuple(facts["class_names"]), dict(weights), lineage, facts["synthetic"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where} is not a model of this system: {error}") from None


def load_tensors(data: bytes, *, where: str) -> dict[str, Any]:
    """Tensors and plain values, nothing that runs code. Raises CheckpointError."""
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # torch raises many kinds on damaged files, with advice that is not ours
        content = None
    if not isinstance(content, dict) or "about" not in content:
        raise CheckpointError(
            f"{where} is no checkpoint of this system, or damaged\n"
            f"  do: name a run's folder, a folder of its checkpoints, or a {RunFolder.MODEL}"
        )
    return content


def preprocessing(recipe: Recipe) -> dict[str, Any]:
    into = recipe.input
    size = {"crop": "central square", "stored_px": into.stored_px, "px": into.px, "channels": into.channels}
    return size | {"scale": 1 / 255, "mean": into.mean, "std": into.std}


def read_checkpoint(url: str) -> dict[str, Any]:
    """Raises CheckpointError where it is not committed, or its bytes have another SHA-256."""
    return load_tensors(checked_bytes(url), where=CheckpointFolder(url).data_url)


def checked_bytes(url: str) -> bytes:
    folder = CheckpointFolder(url)
    marker = folder.marker()
    if marker is None:
        raise CheckpointError(f"{url} is not a committed checkpoint: it has no marker")
    try:
        return storage.read_checked(folder.data_url, num_bytes=marker.num_bytes, digest=marker.sha256)
    except DataError as error:
        raise CheckpointError(f"{error}\n  do: delete {url}; the run goes on from the checkpoint before it") from None


def network_weights(checkpoint: dict[str, Any]) -> dict[str, Tensor]:
    """The network's state_dict out of a Lightning checkpoint of ours: their average where the run keeps one."""
    state = checkpoint["state_dict"]
    prefix = "average." if any(name.startswith("average.") for name in state) else "network."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def find_model(checkpoint: str) -> Model:
    """The model that CHECKPOINT names: a run's folder, a committed checkpoint's folder, or a model file; a path or a URL.

    Raises CheckpointError where it names none, or its bytes are not those that were written.
    """
    url = checkpoint.rstrip("/").removesuffix(f"/{CheckpointFolder.DATA}")
    if CheckpointFolder(url).marker() is not None:
        content = read_checkpoint(url)
        return model_of(content, network_weights(content), where=url)
    run = RunFolder(url)
    if storage.exists(run.model_url):
        url = run.model_url
    elif storage.exists(run.config_url):
        remedy = "let it finish, or name a checkpoint of it"
        raise CheckpointError(f"{url} is a run that has left no {run.MODEL} yet\n  do: {remedy}")
    elif not storage.exists(url):
        raise CheckpointError(f"{checkpoint}: there is no such run, checkpoint or {run.MODEL}")
    try:
        return load_model(url)
    except MissingError:
        raise CheckpointError(f"{checkpoint} is a folder without a {run.MODEL} or a committed checkpoint") from None


def source_model(config: RunConfig, run: RunFolder) -> Model:
    """The weights that this run starts from. Raises CheckpointError where they are not those that were named."""
    assert config.init is not None
    if config.source_run is not None:
        return find_model(run.suite.run(config.source_run).url)
    source = find_model(config.init.run)
    if source.weights_sha256 != config.init.identity:
        fault = f"has other weights than when {config.name} was asked for"
        raise CheckpointError(f"{source.url} {fault}\n  do: bring them back, or take another --id")
    return source
