"""The same few images in the format of every loader that `bench speed` compares.

Comes in: a packed set. Goes out: a folder with these images as files, as shards of ours, and as the peers' own sets.
"""

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imgcls import storage
from imgcls.data.images import decode, stored_pixels
from imgcls.data.shards import fetch_shard, pack, read_manifest, read_samples
from imgcls.data.sources import open_source
from imgcls.errors import DataError
from imgcls.recipe import Recipe
from imgcls.records import Manifest, Split

ROOT = Path(__file__).parents[2]
PLACE = ROOT / ".peers"
"""Where the optional peers are installed: apart from our environment, since Lightning imports transformers where it is."""
PEERS = ("litdata", "streaming")
CHUNK_BYTES = 4 << 20
"""Of the peers' own files. Measured: with 16 and 64 MB litdata hands out 8,000 arrays at a twentieth of its speed."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Images of one packed set, of a size that a bench has time for."""

    recipe: Recipe
    folder: Path

    @property
    def images(self) -> Path:
        """`<split>/<class>/<number>.<ending>`."""
        return self.folder / "images"

    @property
    def packed(self) -> Path:
        """Our shards are `<packed>/<dataset>/`."""
        return self.folder / "packed"

    @property
    def set_url(self) -> str:
        return str(self.packed / self.recipe.dataset)

    def of_peer(self, peer: str, form: str) -> Path:
        """The set in a peer's own format. form: `files`, bytes as they are, or `arrays`, decoded and resized."""
        return self.folder / f"{peer}-{form}"


def check_peers() -> None:
    """The optional peers can be imported from now on. Raises DataError."""
    if PLACE.is_dir() and str(PLACE) not in sys.path:
        sys.path.append(str(PLACE))
    missing = [peer for peer in PEERS if find_spec(peer) is None]
    if missing:
        raise DataError(
            f"bench speed data compares with {' and '.join(missing)}, which this environment has not\n"
            "  do: python -m pip install --no-deps --target .peers -r tests/speed/peers.txt"
        )


def prepare(recipe: Recipe, data_url: str, folder: Path, *, num_train: int, num_test: int) -> Prepared:
    """As files and as our shards: the first images of the set's training part, and of its test part.

    Raises DataError where the set is synthetic: a figure of it says nothing.
    """
    set_url = storage.join(data_url, recipe.dataset)
    manifest, prepared = read_manifest(set_url), Prepared(recipe, folder)
    if manifest.synthetic:
        raise DataError(f"{set_url} is SYNTHETIC: its figures say nothing, and are not recorded")
    counts: dict[Split, int] = {"train": num_train, "test": num_test}
    for split, count in counts.items():
        for number, (image, label) in zip(range(count), _samples(set_url, manifest, split), strict=False):
            kind = (Image.open(io.BytesIO(image)).format or "").lower()
            file = prepared.images / split / f"{label:03d}" / f"{number:06d}.{'jpg' if kind == 'jpeg' else kind}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(image)
    pack(open_source(prepared.images), prepared.set_url, name=recipe.dataset)
    return prepared


def _samples(set_url: str, manifest: Manifest, split: Split) -> Iterator[tuple[bytes, int]]:
    for shard in manifest.shards:
        if shard.split == split:
            yield from read_samples(shard, fetch_shard(set_url, shard))


def prepare_peers(prepared: Prepared) -> None:
    """The training part in the formats of the optional peers."""
    for form in ("files", "arrays"):
        samples = [_stored(prepared.recipe, file, form) for file in sorted((prepared.images / "train").glob("*/*"))]
        _write_litdata(samples, prepared.of_peer("litdata", form))
        _write_streaming(samples, prepared.of_peer("streaming", form))


def _stored(recipe: Recipe, file: Path, form: str) -> dict[str, Any]:
    into, data, label = recipe.input, file.read_bytes(), int(file.parent.name)
    if form == "files":
        return {"image": data, "label": label}
    return {"image": stored_pixels(decode(data), px=into.stored_px, channels=into.channels), "label": label}


def _write_litdata(samples: list[dict[str, Any]], to: Path) -> None:
    writer = import_module("litdata.streaming.writer").BinaryWriter(str(to), chunk_bytes=CHUNK_BYTES)
    for number, sample in enumerate(samples):
        writer.add_item(number, sample)
    writer.done()
    writer.merge()


def _write_streaming(samples: list[dict[str, Any]], to: Path) -> None:
    image = samples[0]["image"]
    shape = ",".join(map(str, image.shape)) if isinstance(image, np.ndarray) else ""
    columns = {"image": f"ndarray:uint8:{shape}" if shape else "bytes", "label": "int"}
    with import_module("streaming").MDSWriter(out=str(to), columns=columns, size_limit=CHUNK_BYTES) as out:
        for sample in samples:
            out.write(sample)


def num_prepared(prepared: Prepared) -> int:
    """Images of the training part."""
    return len(read_manifest(prepared.set_url).labels("train"))
