"""Which data sets and images some weights have seen, and the refusal of a source that saw the target's.

Light to import: asked before Ray and torch are needed, and once more where the weights are loaded.
"""

from dataclasses import dataclass

import numpy as np

from imgcls.errors import CheckpointError
from imgcls.records import LineageEntry


@dataclass(frozen=True, slots=True)
class Seen:
    """A data set that weights were trained on."""

    entry: LineageEntry
    pixels: np.ndarray
    """8 bytes of each image's pixel SHA-256: uint64, sorted."""


def refuse_seen_images(lineage: tuple[Seen, ...], *, source: str, dataset: str, pixels: np.ndarray) -> None:
    """No ancestor of `source` saw the data set or one of its images, else it is no transfer. Raises CheckpointError."""
    for seen in lineage:
        shared = np.isin(pixels, seen.pixels).sum()
        if seen.entry.dataset == dataset or shared:
            raise CheckpointError(
                f"{source} is no source for {dataset}: its lineage saw {seen.entry.dataset} (run {seen.entry.run}), "
                f"which shares {shared:,} of {len(pixels):,} images\n"
                "  do: start from weights that never saw them, or train from scratch"
            )
