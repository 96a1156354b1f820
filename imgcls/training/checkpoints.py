"""Checkpoints of one run: written, read back, committed by a marker, kept or deleted. Behind Lightning's `CheckpointIO`.

The same store with and without Ray; rank 0 writes, all ranks read. The names in a checkpoint's folder: `imgcls.runs`.
"""

import io
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from imgcls import storage
from imgcls.errors import CheckpointError, DamagedError, DataError, MissingError, NumericsError, StorageError, first_line
from imgcls.records import RunOptions
from imgcls.runs import CheckpointFacts, CheckpointFolder, Committed
from imgcls.training.weights import checked_bytes, read_checkpoint


class CheckpointStore(CheckpointIO):
    """In a bucket a checkpoint is written while the training goes on, one at a time; `wait` returns when it is committed."""

    def __init__(self, url: str, *, say: Callable[[str], None] = lambda text: None) -> None:
        """say: hears of what is damaged."""
        self.url, self.say = url, say
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._under_way: Future[None] | None = None

    def place(self, step: int) -> str:
        return storage.join(self.url, f"step-{step:08d}")

    def committed(self) -> list[Committed]:
        """By step, ascending. A marker that cannot be read is none."""
        markers = []
        for name in storage.folders(self.url):
            try:
                if marker := CheckpointFolder(storage.join(self.url, name)).marker():
                    markers.append(marker)
            except DamagedError as error:
                self.say(f"{first_line(error)}: this checkpoint does not count")
            except DataError as error:  # whole, and of another version: no reason to lose it
                raise NumericsError(f"{error}\n  do: go on with the version that wrote it, or take another --id") from None
        return sorted(markers, key=lambda marker: marker.step)

    def newest_whole(self) -> Committed | None:
        """The newest checkpoint whose bytes are those that were written, and its best epoch's too; nothing is loaded.

        Newer ones are gone: a run that goes on from here makes them again, to the same bits.
        """
        for marker in reversed(self.committed()):
            try:
                for step in {marker.step, marker.step if marker.best_step is None else marker.best_step}:
                    checked_bytes(self.place(step))
                return marker
            except (CheckpointError, DamagedError, MissingError) as error:
                self.say(f"{first_line(error)}: step {marker.step} is not used, an earlier checkpoint is")
                self.remove_checkpoint(self.place(marker.step))
        return None

    def prune(self, options: RunOptions, *, in_use: int | None = None) -> int:
        """The best, the last two, the one in use and the newest others stay, as `options` say. Returns the bytes kept.

        Two, as nothing that goes on from the last has shown yet that it can be read.

        in_use: the step that this attempt goes on from.
        """
        markers = self.committed()
        kept = [marker for marker in markers if marker in markers[-2:] or marker.step == in_use]
        bests = {marker.best_step for marker in kept}  # without its best epoch's none of them could be gone on from
        kept = [marker for marker in markers if marker in kept or marker.step in bests]
        size, budget_mb = sum(marker.num_bytes for marker in kept), options.checkpoint_budget_mb
        for rank, marker in enumerate(marker for marker in reversed(markers) if marker not in kept):
            fits = budget_mb is None or size + marker.num_bytes <= budget_mb * 1e6
            if rank < options.checkpoint_keep and fits:
                size += marker.num_bytes
            else:
                self.remove_checkpoint(self.place(marker.step))
        return size

    def clean(self) -> None:
        """What a kill left half-written is gone."""
        committed = {storage.name_of(self.place(marker.step)) for marker in self.committed()}
        for name in storage.folders(self.url):
            if name not in committed:
                self.say(f"{name} was never committed: removed")
                storage.delete(storage.join(self.url, name))

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Committed at `path`: the data are there and were read back before the marker is.

        storage_options: the CheckpointFacts.
        """
        assert isinstance(storage_options, CheckpointFacts)
        torch.save(checkpoint, file := io.BytesIO())
        self.wait()
        self._under_way = self._writer.submit(_put, CheckpointFolder(str(path)), file.getvalue(), storage_options)
        if storage.is_local(self.url):
            self.wait()

    def wait(self) -> None:
        """Raises StorageError where the last write failed."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()

    def teardown(self) -> None:
        with suppress(StorageError):  # `wait` has said it before, or it would hide what ended the training
            self.wait()

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: Any = None) -> dict[str, Any]:
        """The checked content of a committed checkpoint, on the CPU."""
        return read_checkpoint(str(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        CheckpointFolder(str(path)).delete()


def _put(folder: CheckpointFolder, data: bytes, facts: CheckpointFacts) -> None:
    marker = Committed(num_bytes=len(data), sha256=storage.sha256(data), **facts.model_dump())
    with storage.within(storage.deadline_s(2 * len(data))):  # there and back
        storage.write_bytes(folder.data_url, data)
        try:
            storage.read_checked(folder.data_url, num_bytes=marker.num_bytes, digest=marker.sha256)
        except DataError as error:
            raise StorageError(f"{error}\n  do: look at the disk or bucket") from None
        folder.commit(marker)
