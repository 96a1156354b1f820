"""Search for better values of a recipe's fields; leaves a recipe file and a page."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from imgcls.errors import RecipeError
from imgcls.recipe import FromRun, derive, digest_of
from imgcls.records import check_flags
from imgcls.search import Search, Space, space_from, space_of
from jobs._door import enter
from jobs._request import Flags, carry_out, chosen_one


def search(
    recipe_name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="RECIPE")] = None,
    /,
    metric: Literal["val/accuracy", "val/loss"] = "val/accuracy",
    num_trials: int = 16,
    max_epochs: int | None = None,
    space: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    flags: tyro.conf.OmitArgPrefixes[Flags] = Flags(),
) -> int:
    """Search for better values of a recipe's fields, by trials in parallel; the worse ones are stopped early.

    Args:
        recipe_name: basic-cnn, resnet18, regularized, scratch or finetuned; or give --recipe FILE.
        metric: By which trials are compared.
        num_trials: The first one is the recipe itself; the others are drawn by --seed, with which they also train.
        max_epochs: Of a trial that is not stopped; as many as the recipe has unless given.
        space: What may change, as TOML; without it, what is worth trying around the recipe.
        flags: Shared with jobs.train.
    """
    named, (recipe,) = chosen_one(flags, recipe_name)
    if isinstance(recipe.init, FromRun) and flags.init_from is None:
        start = f"{recipe.name} starts from a run of {recipe.init.recipe}"
        raise RecipeError(f"{start}\n  do: name its weights with --init-from")
    recipe = recipe if max_epochs is None else derive(recipe, {"length.epochs": max_epochs})
    domains = space_of(recipe) if space is None else _from_file(space)
    wanted = Search(recipe=recipe, space=domains, metric=metric, num_trials=num_trials, seed=flags.seed)
    check_flags(wanted)
    if flags.id is None:
        asked = [recipe.to_json(), sorted(map(str, domains.items())), metric, flags.seed, flags.init_from]
        named = replace(named, id=f"search-{recipe.name}-{digest_of(asked)[:8]}")
    return carry_out(named, wanted.trials(), wanted)


def _from_file(path: Path) -> Space:
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"--space {path} cannot be read as TOML: {error}") from None
    return space_from(value, where=f"--space {path}")


if __name__ == "__main__":
    enter(search)
