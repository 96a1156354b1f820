"""`bench speed start`: seconds from the command to the end of the first training step of `basic-cnn`."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from imgcls.catalogue import recipe_of
from tests.proof.records import Timed
from tests.speed.commands import count_of, start, words_of
from tests.speed.prepared import ROOT, Prepared, prepare
from tests.speed.turns import Turns
from tests.system.heads import TOKEN, serving

NOTES = (
    "imgcls: until the folder of the checkpoint after its first step is there, so that a part of that commit counts too; "
    "the others: until Lightning's hook at the end of the first step.",
    "imgcls: images decoded before. Plain Lightning and Ray by the book decode them in two loader workers.",
    "Plain Lightning is one process; its seconds stand beside those of one worker and of two, with and without a cluster.",
)
RECIPE = "basic-cnn"
NUM_TRAIN, NUM_TEST = 300, 60
CHANGES = {"length.epochs": 1}


def measure_start(data_url: str, repeats: int, say: Callable[[str], None]) -> list[Timed]:
    turns = Turns(say)
    with tempfile.TemporaryDirectory(prefix="speed") as folder:
        prepared = prepare(recipe_of("quick", RECIPE), data_url, Path(folder), num_train=NUM_TRAIN, num_test=NUM_TEST)
        env = {"IMGCLS_CACHE": str(prepared.folder / "cache")}
        _ours(prepared, "warm-up", 1, env)  # decodes the images
        for repeat in range(repeats):
            lightning_s = _book(prepared, f"{repeat}-lightning", 0, env)
            _compare(turns, prepared, lightning_s, f"{repeat}-cold", "start, nothing is up", env)
            with serving(PYTHONPATH=str(ROOT)) as head:
                up = env | {"RAY_ADDRESS": head.gcs, "RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "token"}
                _compare(turns, prepared, lightning_s, f"{repeat}-up", "start, the cluster is up", up)
    return turns.items()


def _compare(turns: Turns, given: Prepared, lightning_s: float, id: str, title: str, env: Mapping[str, str]) -> None:
    for workers in (1, 2):
        group = f"{title}, {workers} worker{'s' * (workers > 1)}"
        turns.add(group, "plain Lightning", "peer", "s", lightning_s)
        turns.add(group, "Ray by the book", "peer", "s", _book(given, f"{id}-book-{workers}", workers, env))
        turns.add(group, "imgcls", "ours", "s", _ours(given, f"{id}-{workers}", workers, env))


def _book(given: Prepared, id: str, workers: int, env: Mapping[str, str]) -> float:
    first = given.folder / "book" / id / "first"
    first.parent.mkdir(parents=True)
    words = ("tests.speed.book", str(given.images / "train"), str(first), str(workers))
    return start(*words, env=env).seconds_until(first.exists)


def _ours(given: Prepared, id: str, workers: int, env: Mapping[str, str]) -> float:
    runs = given.folder / "runs"
    words = [RECIPE, "--data", str(given.packed), "--storage", str(runs), "--id", id, "--num-workers", str(workers)]
    words += ["--checkpoint-every-n-steps", "1", *words_of(CHANGES)]
    return start("jobs.train", *words, env=env).seconds_until(lambda: count_of(runs / id, "*/checkpoints/step-*") > 0)
