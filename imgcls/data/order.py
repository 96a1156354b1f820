"""Which samples make step k, and which of them are this rank's: pure functions of numbers.

Nothing here keeps state, so nothing has to be saved: whoever resumes asks again. Called by `batches`, checked by
`training.ledger` against what was really seen.
"""

import math

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash64(*words: int | Ids | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A 64-bit hash of the words, elementwise with broadcasting; equal on every platform and version.

    Source: the finalizer of SplitMix64 (Steele, Lea, Flood 2014), applied once a word.
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in words:
            state = state ^ (np.asarray(word).astype(np.int64).view(np.uint64))
            state = state * np.uint64(0xD1B54A32D192ED03) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return np.atleast_1d(state)


def uniforms(seed: int, epoch: int, ids: Ids, k: int) -> NDArray[np.float32]:
    """The k random numbers of each sample in this epoch: [0, 1), (ids, k)."""
    bits = hash64(seed, epoch, ids[:, None], np.arange(k)[None, :])
    return ((bits >> np.uint64(40)).astype(np.float32)) / np.float32(1 << 24)


def permutation(seed: int, epoch: int, n: int) -> Ids:
    """The order of 0 .. n-1 in this epoch."""
    # A key of its own, apart from those of `uniforms`.
    return np.argsort(hash64(seed, epoch, np.arange(n), -1), kind="stable").astype(np.int64)


def global_batches(ids: Ids, *, seed: int, epoch: int, size: int, keep_last: bool) -> list[Ids]:
    """The epoch's steps: every planned id in exactly one of them; the last may be smaller, or is dropped."""
    shuffled = ids[permutation(seed, epoch, len(ids))]
    batches = [shuffled[start : start + size] for start in range(0, len(ids), size)]
    return batches if keep_last or len(ids) % size == 0 else batches[:-1]


def num_steps(num_samples: int, *, size: int, keep_last: bool) -> int:
    return math.ceil(num_samples / size) if keep_last else num_samples // size


def rank_part(batch: Ids, *, rank: int, world_size: int) -> Ids:
    """This rank's part of a global batch; parts differ by at most one sample and together are the batch."""
    return batch[slice(*rank_bounds(len(batch), rank=rank, world_size=world_size))]


def rank_bounds(size: int, *, rank: int, world_size: int) -> tuple[int, int]:
    """Where a rank's part of a global batch of this size begins and ends. A world of half the size has the same bounds."""
    return size * rank // world_size, size * (rank + 1) // world_size


def evaluation_batches(num_samples: int, *, rank: int, world_size: int, size: int) -> list[tuple[Ids, int]]:
    """Rank r's rows r, r + W, ... in batches of one fixed shape, each with the number of its rows that count.

    The last batch is filled up with row 0, so that no bit of a real row depends on how many there are. Every rank
    has the same number of batches.
    """
    rows = np.arange(rank, num_samples, world_size)
    steps = math.ceil(math.ceil(num_samples / world_size) / size)
    padded = np.pad(rows, (0, steps * size - len(rows)))
    counts = [min(size, max(0, len(rows) - step * size)) for step in range(steps)]
    return list(zip(padded.reshape(steps, size), counts, strict=True))


def stratified_cut(labels: NDArray[np.int64], *, fraction: float, seed: int) -> tuple[Ids, Ids]:
    """(kept, cut): ids in ascending order; `cut` holds the rounded fraction of every class, at least one of each.

    At least one of each stays, too: a class of one sample is kept.
    """
    draw = hash64(seed, np.arange(len(labels)), -2)
    cut = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        cut[members[np.argsort(draw[members], kind="stable")[:count]]] = True
    return np.flatnonzero(~cut), np.flatnonzero(cut)
