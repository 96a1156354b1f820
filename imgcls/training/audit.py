"""Pieces of a run that is over are trained again, and compared with what it left.

Order and randomness are functions of the request, and a checkpoint holds all that a step needs. So whoever has the data can
train any piece between two checkpoints again, on a machine of the same numerics, and has to come to the same bits.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import torch

from imgcls import storage
from imgcls.errors import CheckpointError, LeaseError, NumericsError
from imgcls.recipe import differing_fields
from imgcls.records import Audit, RunConfig, RunOptions, RunResult
from imgcls.runs import CheckpointFolder, Committed, RunFolder
from imgcls.training import environment, weights
from imgcls.training.checkpoints import CheckpointStore
from imgcls.training.evaluate import evaluate
from imgcls.training.fit import fit
from imgcls.training.world import World

MEASURED = {"timing", "seconds", "epoch_s", "traffic", "checkpoint_costs_s", "numerics_changes"}
"""Parts of a checkpoint that say how long something took, or where it was made: no two attempts have the same."""
REPEATED = ("weights_sha256", "history_sha256", "best_weights_sha256", "predictions_sha256", "val", "test")
"""Of a result: what training again to the end has to come to."""


@dataclass(frozen=True, slots=True)
class Piece:
    first: Committed | None
    """None: the run's beginning."""
    last: Committed

    @property
    def steps(self) -> str:
        return f"{self.first.step if self.first else 0} to {self.last.step}"


def audit(run: RunFolder, *, data_url: str, num_pieces: int, seed: int) -> Audit:
    """Some pieces, drawn by `seed`, are trained again; then the run's model is tested again.

    Raises CheckpointError where the run is not over, or its records contradict each other; DataError where data or records
    are not those of the run; NumericsError where this machine computes other last bits.
    """
    config, result = _over(run)
    pieces = _pieces(CheckpointStore(run.checkpoints_url), config)
    drawn = sorted(random.Random(seed).sample(pieces, min(num_pieces, len(pieces))), key=lambda piece: piece.last.step)
    difference = next(filter(None, (_trained_again(piece, run, config, result, data_url) for piece in drawn)), "")
    return Audit(
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=seed,
        steps=tuple(piece.steps for piece in drawn),
        num_pieces=len(pieces),
        difference=difference or _tested_again(run, result, pieces[-1].last.numerics, data_url),
        commit=environment.commit() or "unknown",
        hardware=environment.hardware(),
    )


def _over(run: RunFolder) -> tuple[RunConfig, RunResult]:
    config, result = run.config(), run.result()
    if config is None or result is None or result.status != "finished":
        raise CheckpointError(f"{run.url} is no run that is finished\n  do: name the folder of one")
    if config.digest() != result.digest:
        raise CheckpointError(f"{run.config_url} asks for another run than {run.RESULT} is of: one of them was altered")
    run.history(result)
    return config, result


def _pieces(store: CheckpointStore, config: RunConfig) -> list[Piece]:
    """Between every two checkpoints that are there, and from the beginning to the first."""
    there = store.committed()
    if not there:
        raise CheckpointError(f"{store.url} holds no checkpoint to compare with")
    for marker in there:
        if marker.run_digest != config.digest():
            raise CheckpointError(f"{store.place(marker.step)} is of another request than {RunFolder.CONFIG}: one is wrong")
    whole, pairs = {None, *(marker.step for marker in there)}, zip([None, *there], there, strict=False)
    return [Piece(first, last) for first, last in pairs if first is None or first.best_step in whole]


@contextmanager
def _as_then(numerics: dict[str, str]) -> Iterator[World]:
    """One rank, with the device and the number of threads that the run had, where this machine has them."""
    count, on_gpu = numerics.get("threads", ""), "CUDA" in numerics["device"] and bool(environment.gpus())
    with environment.threads(int(count) if count.isdigit() else None):
        yield World(accelerator="gpu" if on_gpu else "cpu")


def _tested_again(run: RunFolder, result: RunResult, numerics: dict[str, str], data_url: str) -> str:
    model = weights.find_model(run.model_url)
    if model.weights_sha256 != result.best_weights_sha256:
        return f"{run.MODEL} holds other weights than {run.RESULT} says"
    if result.test is None:
        return ""  # a trial of a search
    with _as_then(numerics) as world:
        again = evaluate(model, data_url=data_url, split="test", world=world)
    return "" if again == result.test else f"{run.MODEL}, tested again, has other scores than {run.RESULT} says"


def _trained_again(piece: Piece, run: RunFolder, config: RunConfig, result: RunResult, data_url: str) -> str:
    """What differs from what the run left, or nothing."""
    numerics = piece.last.numerics
    with _as_then(numerics) as world, storage.temporary_folder("audit") as folder:
        here = environment.numerics(config.recipe, world_size=1, accelerator=world.accelerator)
        if changes := [*result.numerics_changes, *differing_fields(numerics, here)]:
            raise NumericsError(
                f"{config.name} cannot be compared here: it was trained under other numerics: {'; '.join(changes)} "
                "(before / after)\n  do: audit it on such a machine; a run of several ddp workers, or a moved one, has none"
            )
        again = RunFolder(storage.join(folder, storage.name_of(run.suite.url), run.name))
        _lay_out(piece, run, config, again)
        end = CheckpointFolder(CheckpointStore(again.checkpoints_url).place(piece.last.step))
        replayed = None
        with suppress(LeaseError):  # `lost`: it has come to the end of the piece
            replayed = fit(
                config,
                data_url=data_url,
                run_url=again.url,
                tested=result.test is not None,
                world=replace(world, lost=lambda: not piece.last.finished and end.marker() is not None),
                options=RunOptions(checkpoint_every_n_steps=piece.last.step),
            )
        theirs = weights.read_checkpoint(CheckpointStore(run.checkpoints_url).place(piece.last.step))
        where = f"step {piece.last.step}, trained again from step {piece.first.step if piece.first else 0}"
        for path in differing(theirs, weights.read_checkpoint(end.url)):
            return f"{where}: {path} differs"
        names = [name for name in REPEATED if replayed and getattr(replayed, name) != getattr(result, name)]
        return f"{where}: {', '.join(names)} of {run.RESULT} differ" if names else ""


def _lay_out(piece: Piece, run: RunFolder, config: RunConfig, again: RunFolder) -> None:
    """What `fit` goes on from."""
    if config.source_run is not None:
        source = run.suite.run(config.source_run).model_url
        storage.write_bytes(again.suite.run(config.source_run).model_url, storage.read_bytes(source))
    theirs, ours = CheckpointStore(run.checkpoints_url), CheckpointStore(again.checkpoints_url)
    needed = {piece.first.step, piece.first.best_step} if piece.first else set()
    for marker in theirs.committed():
        if marker.step in needed:
            place = CheckpointFolder(ours.place(marker.step))
            storage.write_bytes(place.data_url, weights.checked_bytes(theirs.place(marker.step)))
            place.commit(marker)


def differing(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Where two checkpoints' contents differ, apart from what was measured."""
    if isinstance(a, dict) and isinstance(b, dict):
        for name in [*a, *(name for name in b if name not in a)]:
            if name not in MEASURED:
                yield from differing(a.get(name), b.get(name), f"{path}.{name}" if path else str(name))
    elif isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str) and len(a) == len(b):
        for number, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differing(one, other, f"{path}[{number}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if weights.weights_sha256({path: a}) != weights.weights_sha256({path: b}):
            yield path
    elif type(a) is not type(b) or a != b:
        yield path
