"""A model and the bytes of an image -> its most probable classes."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from imgcls.data.augment import inputs
from imgcls.data.images import decode, stored_pixels
from imgcls.errors import CheckpointError, first_line
from imgcls.models.build import build_model
from imgcls.training.weights import Model


def load_network(model: Model) -> torch.nn.Module:
    network = build_model(model.recipe, num_classes=len(model.class_names), seed=0)
    try:
        network.load_state_dict(model.weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit their own recipe: {first_line(error)}") from None
    return network.eval()


class Predictor:
    """A model, ready for images."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.network = load_network(model)

    def pixels(self, image: bytes) -> NDArray[np.uint8]:
        """What the network's inputs are made of. Raises Pillow's errors where `image` is no image."""
        into = self.model.recipe.input
        return stored_pixels(decode(image), px=into.stored_px, channels=into.channels)

    @torch.no_grad()
    def top(self, images: Sequence[NDArray[np.uint8]], count: int) -> list[list[tuple[str, float]]]:
        """Of each, (class name, probability) of the `count` most probable classes, most probable first."""
        names = self.model.class_names
        logits = self.network(inputs(torch.from_numpy(np.stack(images)), self.model.recipe.input))
        tops = zip(*(part.tolist() for part in logits.softmax(1).topk(min(count, len(names)))), strict=True)
        return [[(names[label], p) for p, label in zip(*top, strict=True)] for top in tops]
