"""The same networks and inputs as `paper`, to be trained as well as we can. Guesses, but for `basic-cnn`.

What was measured: docs/results.md.
"""

from dataclasses import replace

from imgcls.catalogue import paper
from imgcls.recipe import AdamW, Augment, BasicCNN, FromRun, Length, OneCycle, Recipe


def _tuned(recipe: Recipe, *, lr: float, epochs: int, augment: Augment) -> Recipe:
    return replace(
        recipe,
        optimizer=AdamW(lr=lr, weight_decay=0.05),
        schedule=OneCycle(warmup=0.2),
        length=Length(epochs=epochs),
        augment=augment,
        label_smoothing=0.1,
    )


_PHOTOS = Augment(flip=True, crop_min_area=0.35, brightness=0.2, contrast=0.2)
_THUMBNAILS = Augment(flip=True, crop_min_area=0.6, rotate_degrees=10.0, brightness=0.2, contrast=0.2, saturation=0.2)

GUESSED = replace(_tuned(paper.BASIC_CNN, lr=4e-3, epochs=40, augment=_PHOTOS), name="basic-cnn-guessed")
"""The rate is about that of the four trials that the search on record did not stop."""

SEARCHED = replace(
    GUESSED,
    name="basic-cnn-searched",
    model=BasicCNN(dropout=0.376),
    augment=Augment(flip=True, crop_min_area=0.8, brightness=0.165, contrast=0.085),
    optimizer=AdamW(lr=4.9e-3, weight_decay=4.2e-3),
)
"""About the search's best trial, whose length was 9 epochs."""

CHOICES = (GUESSED, SEARCHED)
"""The first is the better one in validation."""

BASIC_CNN = replace(
    GUESSED,
    name="basic-cnn",
    model=BasicCNN(dropout=0.5),
    optimizer=AdamW(lr=3e-3, weight_decay=0.05),
    augment=replace(_PHOTOS, crop_min_area=0.25),
    length=Length(epochs=80),
    global_batch_size=64,
)
"""`GUESSED` with four times the steps, a lower rate, more dropout and smaller crops: better in validation."""
RESNET18 = _tuned(paper.RESNET18, lr=2e-3, epochs=40, augment=_PHOTOS)
REGULARIZED = _tuned(paper.REGULARIZED, lr=2e-3, epochs=30, augment=_THUMBNAILS)
SCRATCH = _tuned(paper.SCRATCH, lr=1e-3, epochs=20, augment=Augment(flip=True))
FINETUNED = replace(SCRATCH, name="finetuned", init=FromRun(recipe="resnet18"))

SUITE = (BASIC_CNN, RESNET18, REGULARIZED, SCRATCH, FINETUNED)
