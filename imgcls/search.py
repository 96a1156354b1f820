"""A search over the fields of a recipe: what may change, and the trials that a seed draws. Pure."""

import json
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from imgcls.errors import RecipeError
from imgcls.recipe import AdamW, Count, Recipe, Seed, Strict, derive, leaves


@dataclass(frozen=True, kw_only=True, slots=True)
class Range(Strict):
    kind: Literal["uniform", "log-uniform"]
    low: float
    high: float

    def __post_init__(self) -> None:
        width = self.high - self.low if self.kind == "uniform" or self.low <= 0 else self.high / self.low - 1
        if not 0 < width < math.inf or (self.kind == "log-uniform" and self.low <= 0):
            rule = "low is below high, and above 0 for log-uniform; their distance is a number"
            raise ValueError(f"{self.kind} from {self.low} to {self.high}: {rule}")

    def at(self, u: float) -> float:
        """u: [0, 1). Rounded, the more finely the narrower the range is beside its values."""
        low, high = self.low, self.high
        digits = 3 + round(math.log10(max(abs(low), abs(high)) / (high - low)))
        value = low + u * (high - low) if self.kind == "uniform" else low * (high / low) ** u
        return min(max(float(f"{value:.{digits}g}"), low), high)

    def place(self, value: float | None) -> float:
        """From 0 to 1 within the domain; a recipe's own value may lie outside, or have no place."""
        if self.kind == "uniform":
            return math.nan if value is None else (value - self.low) / (self.high - self.low)
        return math.log(value / self.low) / math.log(self.high / self.low) if value else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice(Strict):
    kind: Literal["choice"] = "choice"
    values: Annotated[tuple[int | float | str | bool | None, ...], Field(min_length=1)]

    def at(self, u: float) -> Any:
        return self.values[int(u * len(self.values))]

    def place(self, value: Any) -> float:
        return self.values.index(value) / max(1, len(self.values) - 1) if value in self.values else math.nan


Space = dict[str, Annotated[Range | Choice, Field(discriminator="kind")]]
"""By the path of a recipe's field."""
_SPACE = TypeAdapter(Space)
FIXED = ("name", "dataset", "init", "length", "validation", "train_fraction")
"""Parts of a recipe that all trials of a search share."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Search(Strict):
    recipe: Recipe
    """What the trials are changes of; its length is theirs."""
    space: Space
    metric: Literal["val/accuracy", "val/loss"] = "val/accuracy"
    num_trials: Count
    seed: Seed = 0

    @property
    def mode(self) -> Literal["min", "max"]:
        return "min" if self.metric == "val/loss" else "max"

    def changes(self, number: int) -> dict[str, Any]:
        """Of the trial with this number; the first one is the recipe itself. However many trials follow changes none."""
        if number == 0:
            return {}
        drawn = np.random.default_rng([self.seed, number]).random(len(self.space))
        return {path: domain.at(u) for (path, domain), u in zip(sorted(self.space.items()), drawn, strict=True)}

    def trials(self) -> tuple[Recipe, ...]:
        """Raises RecipeError where the space names a field that the recipe has not, or a value that it cannot take."""
        derive(self.recipe, self.changes(1))  # with one trial too
        changes = ({"name": f"{self.recipe.name}-{number:03d}"} | self.changes(number) for number in range(self.num_trials))
        return tuple(derive(self.recipe, change) for change in changes)


def space_of(recipe: Recipe) -> Space:
    """What is worth trying around a recipe, unless a file says otherwise."""
    lr, up_to = recipe.optimizer.lr, {"model.dropout": 0.6, "augment.brightness": 0.4, "augment.contrast": 0.4}
    space: Space = {path: Range(kind="uniform", low=0.0, high=high) for path, high in up_to.items()}
    space |= {
        "optimizer.lr": Range(kind="log-uniform", low=lr / 4, high=lr * 4),
        "label_smoothing": Choice(values=(0.0, 0.05, 0.1, 0.2)),
        "augment.flip": Choice(values=(False, True)),
        "augment.crop_min_area": Range(kind="uniform", low=0.25, high=1.0),
    }
    decay: Space = {"optimizer.weight_decay": Range(kind="log-uniform", low=0.003, high=0.3)}
    return space | (decay if isinstance(recipe.optimizer, AdamW) else {})


def space_from(value: Any, *, where: str) -> Space:
    """Raises RecipeError with each wrong field by its path."""
    paths = leaves(value, until="kind")  # [optimizer.lr] of TOML is {"optimizer": {"lr": ..}}
    if fixed := [path for path in paths if path.partition(".")[0] in FIXED]:
        raise RecipeError(f"{where}: {', '.join(fixed)}: trials are compared on the same samples, at the same length")
    if not paths:
        raise RecipeError(f"{where} names no field\n  do: name one, as [optimizer.lr]")
    try:
        return _SPACE.validate_json(json.dumps(paths, default=str))
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise RecipeError(f"{where}: " + "\n  ".join(lines)) from None
