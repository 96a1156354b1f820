"""What one rank knows and every other has to: shared in each training step, read a step later.

By then the device has long been through with it, so that no step waits for what it has itself still to compute. A step
that was not finite is found before its weights are tested or committed. Called by `module`.
"""

from functools import partial
from itertools import chain

import torch
from torch import Tensor

from imgcls.data.order import Ids
from imgcls.errors import LeaseError, TrainingError
from imgcls.training.world import World


class StepFlags:
    def __init__(self, world: World) -> None:
        self.world = world
        self.someone_leaves = False
        """Some rank's node is about to be taken away: known to all ranks at the same step."""
        self.asks_for_checkpoint = self.checkpoint_is_due = False
        """This rank asks for one in its next step; some rank has asked in the step before."""
        self._read = lambda: None
        """Reads what was shared last, where nobody has yet."""

    def share(self, finite: Tensor, ids: Ids, *, epoch: int, step: int) -> None:
        """Every rank calls it in each step, before the gradients meet: nobody is left in a collective."""
        self.checkpoint_is_due = False  # a checkpoint at an epoch's end may have read it
        self.read()
        known = [self.world.leaving(), self.world.lost(), self.asks_for_checkpoint]
        with self.world.heartbeat.waiting():  # for other ranks
            flags = self._of_any_rank(torch.stack([~finite, *(torch.full_like(finite, value) for value in known)]).int())
        there, flags = torch.cuda.Event() if flags.is_cuda else None, flags.to("cpu", non_blocking=True)
        if there:
            there.record()
        self._read = partial(self._read_shared, flags, there, finite, ids, epoch=epoch, step=step)

    def _of_any_rank(self, flags: Tensor) -> Tensor:
        if self.world.size > 1:  # not by Lightning's `reduce`: a barrier comes before it, and waits for the device
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return flags

    def read(self) -> None:
        """Every rank calls it before it goes on from the step that shared last.

        Raises, on every rank, TrainingError where a loss was not finite, LeaseError where somebody else is at this run.
        """
        read, self._read = self._read, lambda: None
        read()

    def _read_shared(
        self, flags: Tensor, there: torch.cuda.Event | None, finite: Tensor, ids: Ids, *, epoch: int, step: int
    ) -> None:
        """flags: on the host, once `there`: of any rank, int32, (not finite, leaves, has lost its run, asks for a
        checkpoint). finite: whether this rank's loss is.
        """
        with self.world.heartbeat.waiting():  # for the device
            if there:
                there.synchronize()
        not_finite, self.someone_leaves, lost, self.checkpoint_is_due = map(bool, flags.tolist())
        if lost:
            raise LeaseError(f"another command has taken this run over at step {step}: it goes on there")
        if not_finite:
            everyones = self.world.gather([] if finite else ids[:8].tolist())
            raise TrainingError(
                f"the loss is not finite in epoch {epoch}, step {step}, "
                f"samples {list(chain(*everyones))[:8]}..\n  do: a lower --set optimizer.lr="
            )
