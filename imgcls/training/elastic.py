"""Virtual ranks: the same bits at 1, 2, 4, .. workers. A training step of a recipe with `numerics="elastic"`.

A global batch is cut into V virtual ranks, however many workers there are. Each is a forward and a backward pass of its
own, with its own batch norm, from the buffers with which the step began. What they find is added in one binary tree:
a worker adds its own, which is a branch of the tree; then all gather the branches, and every worker adds them alike.
Sources: virtual nodes (VirtualFlow, Or et al. 2022); elastic determinism, mosaicml/streaming docs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from imgcls.data.order import rank_bounds


def virtual_parts(global_size: int, *, rank: int, world_size: int, virtual_ranks: int) -> Iterator[tuple[int, slice]]:
    """(virtual rank, its rows in this rank's part), for those of this rank."""
    first, _ = rank_bounds(global_size, rank=rank, world_size=world_size)
    each = virtual_ranks // world_size
    for virtual in range(rank * each, (rank + 1) * each):
        begin, end = rank_bounds(global_size, rank=virtual, world_size=virtual_ranks)
        yield virtual, slice(begin - first, end - first)


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """Their sum, neighbours first: (a + b) + (c + d). As many as a power of two."""
    while len(parts) > 1:
        parts = [left + right for left, right in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def leave_gradients_alone(strategy: DDPStrategy) -> None:
    """The strategy knows its ranks, and does not wrap the module: gradients are added here."""
    strategy.configure_ddp = lambda: None


def virtual_step(
    network: nn.Module,
    forward: Callable[[slice, int], tuple[Tensor, Tensor]],
    parts: Iterable[tuple[int, slice]],
    *,
    virtual_ranks: int,
    gather: Callable[[Tensor, Tensor], Sequence[Tensor]],
    num_steps: int,
) -> None:
    """Every gradient is that of the global batch; running statistics are the mean over virtual ranks.

    forward: a virtual rank's rows to their loss, so scaled that the sum is the global batch's, and whether it is finite.
    gather: this worker's vector to those of all workers, by rank; it hears whether this worker's losses are finite.
    num_steps: with this one, for integer buffers.
    """
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    start = [buffer.clone() for buffer in buffers]
    all_finite = list[Tensor]()
    found = list[Tensor]()  # of each virtual rank its gradients and buffers, as one flat vector
    for virtual, rows in parts:
        _set(buffers, start)
        loss, finite = forward(rows, virtual)
        all_finite.append(finite)
        gradients = torch.autograd.grad(loss, parameters)
        found.append(torch.cat([t.reshape(-1) for t in (*gradients, *(b / virtual_ranks for b in buffers))]))
    whole = tree_sum(gather(tree_sum(found), torch.stack(all_finite).all()))
    tensors = [*parameters, *buffers]
    pieces = [p.view_as(t) for p, t in zip(whole.split([t.numel() for t in tensors]), tensors, strict=True)]
    for parameter, gradient in zip(parameters, pieces, strict=False):
        # In the parameter's own memory format: a fused optimizer walks both as they lie.
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    _set(buffers, pieces[len(parameters) :])
    for counter in network.buffers():
        if not counter.is_floating_point():
            counter.fill_(num_steps)


@torch.no_grad()
def _set(buffers: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
