"""The published figures that we stand beside, as their scripts report them; see docs/published.md for their faults."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    dataset: str
    accuracy: float
    split: str
    """What the accuracy was measured on, by the published scripts' own doing."""
    note: str


_LAST, _BEST = "one seed, last weights", "one seed, best epoch chosen on the test set"
PUBLISHED = {
    "basic-cnn": Published("imagenette", 0.6308, "test", _LAST),
    "resnet18": Published("imagenette", 0.5640, "test", _LAST),
    "regularized": Published("cifar10", 0.8206, "test", _LAST),
    "scratch": Published("cifar10", 0.786, "test, used as validation", _BEST),
    "finetuned": Published("cifar10", 0.834, "test, used as validation", f"{_BEST}; its source had seen CIFAR-10"),
}
