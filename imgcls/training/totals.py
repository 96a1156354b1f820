"""Loss, accuracy and confusion over a split, in integers: no order of adding changes a bit, at any number of ranks. And
what was predicted of each sample.
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.recfunctions import unstructured_to_structured
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from imgcls.data.order import Ids
from imgcls.errors import TrainingError
from imgcls.records import PREDICTED, Scores

_LOSS_UNIT, _LOSS_LIMIT = 2.0**-24, 1e4
"""Losses are added as multiples of the unit, each up to the limit: 5e7 samples fit into 63 bits."""


class Totals(Metric):
    """Added over batches and, by torchmetrics, over ranks. Nothing waits for the device before `compute`."""

    loss: Tensor
    num_not_finite: Tensor
    confusion: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("loss", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_not_finite", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits: (b, classes); labels: int64, (b,)."""
        losses = F.cross_entropy(logits.float(), labels, reduction="none").double()
        self.num_not_finite += (~losses.isfinite()).sum()
        losses = losses.nan_to_num(nan=_LOSS_LIMIT).clamp(max=_LOSS_LIMIT)
        self.loss += (losses / _LOSS_UNIT).round().long().sum()
        pairs = labels * self.num_classes + logits.argmax(dim=1)
        self.confusion.view(-1).scatter_add_(0, pairs, torch.ones_like(pairs))  # `bincount` would ask for the largest

    def compute(self) -> Scores:
        """Raises TrainingError, on every rank, where a loss was not finite."""
        if count := int(self.num_not_finite):
            raise TrainingError(
                f"{count:,} losses are not finite: the weights have diverged\n  do: a lower --set optimizer.lr="
            )
        count = int((confusion := self.confusion.cpu()).sum())
        return Scores(
            num_samples=count,
            loss=int(self.loss) * _LOSS_UNIT / max(1, count),
            accuracy=int(confusion.diagonal().sum()) / max(1, count),
            confusion=tuple(tuple(row) for row in confusion.tolist()),
        )


class Predictions(Metric):
    """Collected over batches and, by torchmetrics, over ranks."""

    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, ids: Ids, logits: Tensor, labels: Tensor) -> None:
        """logits: (b, classes); labels: int64, (b,)."""
        best = logits.argmax(dim=1, keepdim=True)
        probability = logits.float().softmax(dim=1).gather(1, best)
        columns = (torch.from_numpy(ids).to(labels.device)[:, None], labels[:, None], best, probability)
        self.rows.append(torch.cat([column.double() for column in columns], dim=1))

    def compute(self) -> NDArray[np.void]:
        """Rows of `records.PREDICTED`, in the order of the samples."""
        table = unstructured_to_structured(dim_zero_cat(self.rows).cpu().numpy(), np.dtype(list(PREDICTED)))
        return table[np.argsort(table["sample"])]


def as_npy(table: NDArray[np.void]) -> bytes:
    np.save(file := io.BytesIO(), table)
    return file.getvalue()
