"""Where a run is, for whoever shows it."""

from dataclasses import dataclass, field

Row = dict[str, float | int | str]
"""One epoch of a history."""


@dataclass(frozen=True, slots=True)
class Progress:
    phase: str
    """workers import, cache, start, train, test."""
    epoch: int = 0
    """The one under way, from 1."""
    epochs: int = 0
    step: int = 0
    total_steps: int = 0
    images_per_s: float = 0.0
    row: Row = field(default_factory=dict)
    """The history's newest row, where one was just added."""
