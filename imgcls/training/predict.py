"""A model and the bytes of an image -> its most probable classes."""

import torch

from imgcls.data.augment import inputs
from imgcls.data.images import decode, stored_pixels
from imgcls.errors import CheckpointError
from imgcls.models.build import build_model
from imgcls.training.weights import Model


def load_network(model: Model, *, num_classes: int) -> torch.nn.Module:
    network = build_model(model.recipe, num_classes=num_classes, seed=0)
    try:
        network.load_state_dict(model.weights)
    except RuntimeError as error:
        raise CheckpointError(f"the weights do not fit their own recipe: {str(error).splitlines()[0]}") from None
    return network.eval()


class Predictor:
    """A model, ready for one image after another."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.network = load_network(model, num_classes=len(model.class_names))

    @torch.no_grad()
    def top(self, image: bytes, count: int) -> list[tuple[str, float]]:
        """(class name, probability) of the `count` most probable classes, most probable first.

        Raises Pillow's errors where `image` is no image.
        """
        into, names = self.model.recipe.input, self.model.class_names
        pixels = stored_pixels(decode(image), px=into.stored_px, channels=into.channels)
        logits = self.network(inputs(torch.from_numpy(pixels.copy())[None], into))
        probabilities, labels = logits.softmax(1)[0].topk(min(count, len(names)))
        return [(names[label], float(p)) for p, label in zip(probabilities, labels.tolist(), strict=True)]
