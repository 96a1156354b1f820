"""Pack an image folder, a tar, a zip or an official archive as WebDataset shards; or check packed sets."""

from typing import Annotated

import tyro

from imgcls import storage
from imgcls.data import shards
from imgcls.data.sources import open_source
from imgcls.data.synthetic import DEFAULT_NUM_SAMPLES, synthetic_source
from imgcls.disk import local_path
from imgcls.errors import DataError, RecipeError
from jobs._door import DONE, MISSING_OR_BROKEN, enter
from jobs._packing import pack_set, source_of
from jobs._request import checked_name, place
from jobs._terminal import Lines, bar, stderr


def pack(
    dataset: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="DATASET")] = None,
    source: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None,
    to: str = "data/packed",
    num_samples: int = DEFAULT_NUM_SAMPLES,
    max_bad: int = 0,
    verify: Annotated[str | None, tyro.conf.arg(metavar="URL")] = None,
    verbose: bool = False,
) -> int:
    """Pack DATASET into <to>/DATASET/, or check what is packed.

    Args:
        dataset: imagenette, cifar10, or any name for images of your own.
        source: An image folder, a tar or a zip, split/class/image or class/image; or `synthetic`.
        to: Folder or URL of packed sets.
        num_samples: Training images of a synthetic set.
        max_bad: This many files may be no images; they are left out and named.
        verify: Check the packed set, or folder of sets, at this URL; packs nothing.
        verbose: Tracebacks too.
    """
    if verify is not None:
        if dataset is not None or source is not None:
            raise RecipeError("--verify stands alone")
        return _verify(verify)
    if dataset is None:
        raise RecipeError("name a DATASET, as imagenette, or check one with --verify URL")
    checked_name(dataset, "DATASET")
    storage.check_places(writes=[place(to, "--to")])
    if source == "synthetic":
        if num_samples < 100:
            raise RecipeError(f"--num-samples {num_samples}: 100 or more")
        found = synthetic_source(dataset, num_samples)
    else:
        found = open_source(local_path(source)) if source is not None else source_of(dataset, Lines())
    pack_set(found, dataset, to, max_bad=max_bad)
    return DONE


def _verify(url: str) -> int:
    storage.check_places(reads=[url])
    places = [url, *(storage.join(url, name) for name in storage.folders(url))]
    sets = [place for place in places if storage.exists(shards.manifest_url(place))]
    if not sets:
        raise DataError(f"{url} holds no packed set")
    code, lines = DONE, Lines()
    for set_url in sets:
        try:
            with bar(lines, f"checking {set_url}") as progress:
                manifest = shards.verify(set_url, progress=progress)
        except DataError as error:
            code = MISSING_OR_BROKEN
            stderr(f"error: {error}")
            continue
        count, digest = f"{manifest.num_samples:,} samples in {len(manifest.shards)} shards", manifest.digest[:12]
        Lines(synthetic=manifest.synthetic).say(f"{set_url}: whole, {count}, digest {digest}")
    return code


if __name__ == "__main__":
    enter(pack)
