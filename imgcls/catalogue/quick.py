"""Sized for two CPU cores: the five answers in minutes. CIFAR-10 at its own 32 px, on a fraction of its training part.

Not the published settings: compare a row with `paper`'s, not with the published figure.
"""

from dataclasses import replace

from imgcls.recipe import AdamW, Augment, BasicCNN, Cut, FromRun, Input, Length, OneCycle, Recipe, ResNet18

BASIC_CNN = Recipe(
    name="basic-cnn",
    dataset="imagenette",
    input=Input(px=64, channels=1, stored_px=64),
    model=BasicCNN(dropout=0.3),
    augment=Augment(flip=True),
    optimizer=AdamW(lr=1e-3, weight_decay=0.05),
    schedule=OneCycle(warmup=0.25),
    length=Length(epochs=4),
    global_batch_size=128,
    validation=Cut(fraction=0.1, seed=42),
)

RESNET18 = replace(
    BASIC_CNN, name="resnet18", model=ResNet18(), optimizer=AdamW(lr=2e-3, weight_decay=0.05), length=Length(epochs=3)
)

REGULARIZED = Recipe(
    name="regularized",
    dataset="cifar10",
    input=Input(px=32, channels=3, stored_px=32),
    model=ResNet18(dropout=0.2),
    augment=Augment(flip=True, rotate_degrees=10, brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1),
    optimizer=AdamW(lr=2e-3, weight_decay=0.05),
    schedule=OneCycle(warmup=0.25),
    length=Length(epochs=2),
    global_batch_size=128,
    validation=Cut(fraction=0.1, seed=42),
    train_fraction=0.2,
)

SCRATCH = replace(REGULARIZED, name="scratch", model=ResNet18(), augment=Augment())

FINETUNED = replace(SCRATCH, name="finetuned", init=FromRun(recipe="resnet18"))

SUITE = (BASIC_CNN, RESNET18, REGULARIZED, SCRATCH, FINETUNED)
