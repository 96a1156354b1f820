"""`bench speed suite`: seconds of the catalogue `quick`, from the command to its end."""

import tempfile
from collections.abc import Callable

from imgcls import storage
from imgcls.catalogue import suite_of
from imgcls.cpus import usable_cpus
from imgcls.data.cache import open_cache
from imgcls.data.shards import read_manifest
from tests.proof.records import Timed
from tests.speed.commands import start, words_of
from tests.speed.turns import Turns

NOTES = (
    "Images packed and decoded before. By hand: one script trains the five networks one after another, with all cores, on "
    "the same decoded images, and validates and tests them; it commits nothing.",
)


def measure_suite(data_url: str, repeats: int, say: Callable[[str], None], **changes: object) -> list[Timed]:
    """changes: fields of every recipe."""
    turns, fields = Turns(say), [f"{path}={value}" for path, value in changes.items()]
    sets = {(one.dataset, one.input.stored_px, one.input.channels) for one in suite_of("quick")}
    for dataset, px, channels in sorted(sets):
        set_url = storage.join(data_url, dataset)
        open_cache(set_url, read_manifest(set_url), px=px, channels=channels)
    for _ in range(repeats):
        by_hand = start("tests.speed.by_hand", data_url, str(usable_cpus()), "suite", *fields)
        turns.add("suite quick", "five loops by hand", "by hand", "s", by_hand.finish())
        with tempfile.TemporaryDirectory(prefix="speed") as folder:
            words = ("--data", data_url, "--storage", folder, "--id", "speed", *words_of(changes))
            turns.add("suite quick", "imgcls", "ours", "s", start("jobs.suite", *words).finish())
    return turns.items()
