"""The published settings, their faults corrected (docs/published.md).

Expected: see `docs/measurements/`; what is not there is unmeasured.
"""

from dataclasses import replace

from imgcls.recipe import Adam, Augment, BasicCNN, Cut, FromRun, Input, Length, Recipe, ResNet18

BASIC_CNN = Recipe(
    name="basic-cnn",
    dataset="imagenette",
    input=Input(px=64, channels=1, stored_px=64),
    model=BasicCNN(dropout=0.3),
    optimizer=Adam(lr=1e-3),
    length=Length(epochs=30, patience=5),
    global_batch_size=128,
    validation=Cut(fraction=0.1, seed=42),
)

RESNET18 = replace(BASIC_CNN, name="resnet18", model=ResNet18())
"""The published script names no limit; 30 epochs, as its sibling has, so that the stop is equal."""

REGULARIZED = Recipe(
    name="regularized",
    dataset="cifar10",
    input=Input(px=64, channels=3, stored_px=32),
    model=ResNet18(dropout=0.5),
    augment=Augment(flip=True, rotate_degrees=10.0, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
    optimizer=Adam(lr=1e-3),
    length=Length(epochs=30, patience=5),
    global_batch_size=64,
    validation=Cut(fraction=0.2, seed=42),
)

SCRATCH = Recipe(
    name="scratch",
    dataset="cifar10",
    input=Input(px=224, channels=3, stored_px=32),
    model=ResNet18(),
    optimizer=Adam(lr=1e-4),
    # Published: validation on the test set, and patience 5 for the fine-tuned one: two faults.
    length=Length(epochs=20, patience=7),
    global_batch_size=64,
    validation=Cut(fraction=0.1, seed=42),
)

FINETUNED = replace(SCRATCH, name="finetuned", init=FromRun(recipe="resnet18"))

SUITE = (BASIC_CNN, RESNET18, REGULARIZED, SCRATCH, FINETUNED)
