"""Gradients of all ranks, added in the order of the ranks: whatever a process has learned, the sum has the same bits.

By itself DDP reduces its first step in one bucket and later steps in buckets that it has arranged anew, and an
all-reduce adds in an order that depends on where an element lies in its bucket, on the algorithm that NCCL chose, and
on which ranks share a node. From three ranks on the bits then differ between a process that goes on and a fresh one.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket, _broadcast_coalesced
from torch.distributed.distributed_c10d import _get_default_group
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

BROADCAST_BYTES = 1 << 28
"""At most, in one request."""


def make_repeatable(model: DistributedDataParallel) -> None:
    """`model` adds gradients in the order of the ranks, and leaves buffers to `share_buffers`. Before its first step."""
    model.register_comm_hook(None, _add_in_rank_order)
    model.broadcast_buffers = False


def _add_in_rank_order(state: None, bucket: GradBucket) -> Future[Tensor]:
    """A DDP communication hook: the bucket's sum over ranks. What a rank sends and receives is as much as in a ring."""
    size, world_size = bucket.buffer().numel(), dist.get_world_size()
    padded = nn.functional.pad(bucket.buffer(), (0, -size % world_size))
    parts = torch.empty_like(padded)
    dist.all_to_all_single(parts, padded)  # everyone's share of the elements that are this rank's to add
    first, *others = parts.chunk(world_size)
    for part in others:
        first += part
    gathered = dist.all_gather(list(padded.chunk(world_size)), first, async_op=True)
    assert gathered is not None
    return gathered.get_future().then(lambda done: (done.value(), padded[:size])[1])  # value() raises what failed


def share_buffers(network: nn.Module) -> None:
    """Every rank has rank 0's running statistics. What DDP calls for them, but between backward pass and step."""
    buffers = [buffer for buffer in network.buffers() if buffer.is_floating_point()]
    if buffers:
        _broadcast_coalesced(_get_default_group(), buffers, BROADCAST_BYTES, 0)
