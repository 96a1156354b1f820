"""Train one recipe with one seed: a suite of one. Leaves <storage>/<id>/<recipe>-seed<N>/."""

from typing import Annotated

import tyro

from jobs._door import enter
from jobs._request import Flags, carry_out, chosen_one


def train(
    recipe_name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="RECIPE")] = None,
    /,
    flags: tyro.conf.OmitArgPrefixes[Flags] = Flags(),
) -> int:
    """Train one recipe with one seed.

    Args:
        recipe_name: basic-cnn, resnet18, regularized, scratch or finetuned; or give --recipe FILE.
        flags: Shared with jobs.suite.
    """
    return carry_out(*chosen_one(flags, recipe_name))


if __name__ == "__main__":
    enter(train)
