"""Transfer where it is expected to matter: CIFAR-10 with few labels. Both arms, at each number of labels, are `quick`'s."""

from dataclasses import replace

from imgcls.catalogue import quick
from imgcls.recipe import Length

EPOCHS = {1: 40, 10: 10, 100: 2}
"""By percent of the labels: fewer have more epochs, and still fewer steps."""

SUITE = (
    quick.RESNET18,
    *(
        replace(arm, name=f"{arm.name}-{percent}pct", train_fraction=percent / 100, length=Length(epochs=epochs))
        for percent, epochs in EPOCHS.items()
        for arm in (quick.SCRATCH, quick.FINETUNED)
    ),
)
