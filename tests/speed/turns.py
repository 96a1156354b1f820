"""What was measured so far, by group and name, in the order in which it came."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.proof.records import Kind, Timed

Key = tuple[str, str, Kind, str]


@dataclass
class Turns:
    say: Callable[[str], None]
    values: dict[Key, list[float]] = field(default_factory=dict)

    def add(self, group: str, name: str, kind: Kind, unit: str, value: float) -> None:
        self.values.setdefault((group, name, kind, unit), []).append(round(value, 3))
        self.say(f"{group}: {name}: {value:,.1f} {unit}")

    def items(self) -> list[Timed]:
        return [
            Timed(
                group=group,
                name=name,
                kind=kind,
                unit=unit,
                values=tuple(values),
                median=statistics.median(values),
                n=len(values),
            )
            for (group, name, kind, unit), values in self.values.items()
        ]
