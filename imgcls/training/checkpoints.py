"""Checkpoints of one run: written, read back, committed by a marker, kept or deleted. Behind Lightning's `CheckpointIO`.

    <run>/checkpoints/step-00000268/checkpoint.ckpt     what Lightning resumes from
                                    committed.json      the marker, written last: a folder without it is never read

The same store with and without Ray; rank 0 writes, all ranks read.
"""

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from imgcls import records, storage
from imgcls.errors import CheckpointError, DamagedError, DataError, MissingError, NumericsError, StorageError
from imgcls.records import Keeping
from imgcls.training.weights import Committed, Facts, checked_bytes, read_checkpoint


class CheckpointStore(CheckpointIO):
    """In a bucket a checkpoint is written while the training goes on, one at a time; `wait` returns when it is committed."""

    def __init__(self, url: str, *, say: Callable[[str], None] = lambda text: None) -> None:
        """say: is told of what is damaged."""
        self.url, self.say = url, say
        self._uploads = None if storage.is_local(url) else ThreadPoolExecutor(1, thread_name_prefix="upload")
        self._under_way: Future[None] | None = None

    def place(self, step: int) -> str:
        return storage.join(self.url, f"step-{step:08d}")

    def committed(self) -> list[Committed]:
        """By step, ascending. A marker that cannot be read is none."""
        found = []
        for folder in storage.folders(self.url):
            try:
                marker = records.read_if_there(Committed, storage.join(self.url, folder, "committed.json"))
            except DamagedError as error:
                self.say(f"{_first_line(error)}: this checkpoint does not count")
                continue
            except DataError as error:  # whole, and of another version: no reason to lose it
                raise NumericsError(f"{error}\n  do: go on with the version that wrote it, or take another --id") from None
            if marker is not None:
                found.append(marker)
        return sorted(found, key=lambda one: one.step)

    def last(self) -> Committed | None:
        found = self.committed()
        return found[-1] if found else None

    def newest_whole(self) -> Committed | None:
        """The newest checkpoint whose bytes are those that were written, and its best epoch's too; nothing is loaded.

        Newer ones are gone: a run that goes on from here makes them again, to the same bits.
        """
        for one in reversed(self.committed()):
            try:
                for step in {one.step, one.step if one.best_step is None else one.best_step}:
                    checked_bytes(self.place(step))
                return one
            except (CheckpointError, DamagedError, MissingError) as error:
                self.say(f"{_first_line(error)}: step {one.step} is not used, an earlier checkpoint is")
                self.remove_checkpoint(self.place(one.step))
        return None

    def prune(self, keeping: Keeping, *, in_use: int | None = None) -> int:
        """The best, the last two, the one in use and the newest others stay, as `keeping` says. Returns the bytes kept.

        Two, as nothing that goes on from the last has shown yet that it can be read.

        in_use: the step that this attempt goes on from.
        """
        found = self.committed()
        kept = [one for one in found if one in found[-2:] or one.step == in_use]
        bests = {one.best_step for one in kept}  # without its best epoch's none of them could be gone on from
        kept = [one for one in found if one in kept or one.step in bests]
        others = [one for one in reversed(found) if one not in kept]
        size = sum(one.num_bytes for one in kept)
        for rank, one in enumerate(others):
            fits = keeping.budget_bytes is None or size + one.num_bytes <= keeping.budget_bytes
            if rank < keeping.num_recent and fits:
                size += one.num_bytes
            else:
                self.remove_checkpoint(self.place(one.step))
        return size

    def clean(self) -> None:
        """What a kill left half-written is gone."""
        committed = {storage.name_of(self.place(one.step)) for one in self.committed()}
        for folder in storage.folders(self.url):
            if folder not in committed:
                self.say(f"{folder} was never committed: removed")
                storage.delete(storage.join(self.url, folder))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Committed at `path`: the data are there and were read back before the marker is. `storage_options`: Facts."""
        assert isinstance(storage_options, Facts)
        file = io.BytesIO()
        torch.save(checkpoint, file)
        data = file.getvalue()
        self.wait()
        if self._uploads is None:
            _put(str(path), data, storage_options)
        else:
            self._under_way = self._uploads.submit(_put, str(path), data, storage_options)

    def wait(self) -> None:
        """Raises StorageError where the last write failed."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def teardown(self) -> None:
        with suppress(StorageError):  # told by `wait` before, or hiding what ended the training
            self.wait()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checked content of a committed checkpoint, on the CPU."""
        return read_checkpoint(str(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        # The marker goes first: a kill in between leaves a folder that nobody reads.
        storage.delete(storage.join(str(path), "committed.json"))
        storage.delete(str(path))


def _put(url: str, data: bytes, facts: Facts) -> None:
    target = storage.join(url, "checkpoint.ckpt")
    marker = Committed(num_bytes=len(data), sha256=storage.sha256(data), **facts.model_dump())
    with storage.within(storage.deadline_s(2 * len(data))):  # there and back
        storage.write_bytes(target, data)
        try:
            storage.read_checked(target, num_bytes=marker.num_bytes, digest=marker.sha256)
        except DataError as error:
            raise StorageError(f"{error}\n  do: look at the disk or bucket") from None
        records.write(marker, storage.join(url, "committed.json"))


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
