"""Sized for two CPU cores: the five answers in minutes. CIFAR-10 at its own 32 px, on a fraction of its training part.

What is not named here is as in `paper`. Not the published settings: compare a row with `paper`'s, not with the
published figure.
"""

from dataclasses import replace

from imgcls.catalogue import paper
from imgcls.recipe import AdamW, Augment, Cut, FromRun, Input, Length, OneCycle, ResNet18

BASIC_CNN = replace(
    paper.BASIC_CNN,
    augment=Augment(flip=True),
    optimizer=AdamW(lr=1e-3, weight_decay=0.05),
    schedule=OneCycle(warmup=0.25),
    length=Length(epochs=4),
)

RESNET18 = replace(
    BASIC_CNN, name="resnet18", model=ResNet18(), optimizer=AdamW(lr=2e-3, weight_decay=0.05), length=Length(epochs=3)
)

REGULARIZED = replace(
    paper.REGULARIZED,
    input=Input(px=32, channels=3, stored_px=32),
    model=ResNet18(dropout=0.2),
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
