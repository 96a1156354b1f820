"""Which samples were really seen, counted in the training step from the ids that came with the pixels.

The digest is a sum of hashes of (step, sample): it does not depend on how a step was cut into parts, nor on the order
inside it, so that every number of workers must come to the same, planned one.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from imgcls.data.order import Ids, hash64

_KEY = -3
"""Apart from the keys of the order and of the uniforms."""


class Entry(NamedTuple):
    """An epoch in the ledger."""

    samples: int
    digest: str


class Ledger(Metric):
    """Added over steps and, by torchmetrics, over ranks."""

    samples: Tensor
    digest: Tensor

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("samples", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("digest", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, ids: Ids, step: int) -> None:
        """ids: of this rank's part; step: in the epoch. Added on the device, hashed on the host: neither waits."""
        self.samples += len(ids)
        self.digest += int(hash64(_KEY, step, ids).sum(dtype=np.uint64).astype(np.int64))

    def compute(self) -> Entry:
        return Entry(int(self.samples), f"{int(self.digest) % (1 << 64):016x}")


def planned(batches: Iterable[Ids]) -> Entry:
    """What the ledger of an epoch of these global batches has to say."""
    ledger = Ledger(sync_on_compute=False)
    for step, ids in enumerate(batches):
        ledger.update(ids, step)
    return ledger.compute()
