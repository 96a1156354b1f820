"""Train the runs of a catalogue, recipes times seeds, in parallel on the cluster; leaves one page of answers."""

from dataclasses import replace
from typing import Annotated

import tyro

from imgcls import storage
from jobs._door import enter
from jobs._packing import pack_what_is_missing
from jobs._request import Flags, carry_out, chosen, place


def suite(
    recipes: Annotated[str | None, tyro.conf.arg(metavar="A,B")] = None,
    num_seeds: int = 1,
    pack: bool = False,
    flags: tyro.conf.OmitArgPrefixes[Flags] = Flags(),
) -> int:
    """Train the runs of a catalogue and draw the page.

    Args:
        recipes: Names, separated by commas; all of the catalogue unless said.
        num_seeds: Runs of each recipe, with seeds that count up from --seed.
        pack: Pack the data sets first that are not in --data yet; without data and network, synthetic ones.
        flags: Shared with jobs.train.
    """
    names = tuple(name.strip() for name in recipes.split(",")) if recipes is not None else None
    flags, changed = chosen(replace(flags, num_seeds=num_seeds), names)
    if pack and not flags.dry_run:
        storage.check_places(writes=[place(flags.data, "--data"), place(flags.storage, "--storage")])
        flags = pack_what_is_missing(flags, changed)
    return carry_out(flags, changed)


if __name__ == "__main__":
    enter(suite)
