"""From a DATASET's name to a packed set: the way that `pack` and `suite --pack` share."""

from dataclasses import replace
from pathlib import Path

from imgcls import storage
from imgcls.data import archives, shards
from imgcls.data.sources import Source, find_source, open_source
from imgcls.data.synthetic import synthetic_source
from imgcls.errors import NoSourceError, first_line
from imgcls.recipe import Recipe
from jobs._request import Flags, request_of
from jobs._terminal import Lines, bar

DOWNLOADS = Path("data/sources")


def source_of(dataset: str, lines: Lines) -> Source:
    """The samples of DATASET: from `IMGCLS_SOURCES`, `data/sources/`, or the official archive.

    Raises NoSourceError where there is none within reach, DataError where there is one that cannot be used.
    """
    try:
        place = find_source(dataset) or _fetched(dataset, lines)
    except NoSourceError as error:
        raise NoSourceError(
            f"{error}\n"
            f"  do: name a folder, tar or zip with --source PATH; or put {dataset}* into data/sources/ or the folder that\n"
            f"      IMGCLS_SOURCES names; or try without data: --source synthetic"
        ) from None
    lines.say(f"{dataset}: from {archives.printable(place)}")
    return open_source(place)


def _fetched(dataset: str, lines: Lines) -> Path:
    """The official archive of DATASET, if it has one."""
    if dataset not in archives.OFFICIAL:
        raise NoSourceError(f"no source for {dataset}")
    archive = archives.OFFICIAL[dataset]
    with bar(lines, f"fetching {archive.url}") as progress:
        return archives.download(archive, DOWNLOADS, progress=progress)


def pack_set(source: Source, dataset: str, to: str, *, max_bad: int = 0) -> None:
    """The set is packed, and what was noticed on the way is said."""
    lines = Lines(synthetic=source.synthetic)
    with bar(lines, f"packing {dataset}") as progress:
        manifest = shards.pack(source, storage.join(to, dataset), name=dataset, max_bad=max_bad, progress=progress)
    for note in manifest.notes:
        lines.say(f"{dataset}: {note}")
    counts = ", ".join(f"{len(found):,} {split}" for split in ("train", "val", "test") if (found := manifest.labels(split)))
    lines.say(
        f"{dataset}: packed {counts}; {len(manifest.class_names)} classes, {len(manifest.shards)} shards, "
        f"digest {manifest.digest[:12]}"
    )


def pack_what_is_missing(flags: Flags, recipes: tuple[Recipe, ...]) -> Flags:
    """All sets of the recipes are packed. Without data and network they are synthetic ones, at a place of their own."""
    lines = Lines()
    try:
        sources = {dataset: source_of(dataset, lines) for dataset in _not_packed(flags, recipes)}
    except NoSourceError as error:
        lines = Lines(synthetic=True)
        lines.say(f"no data: {first_line(error)}")
        lines.say("procedural images take their place; to train on real ones, give them by IMGCLS_SOURCES or data/sources/")
        folder = storage.join(flags.data.rstrip("/").rpartition("/")[0] or ".", "synthetic")
        flags = replace(flags, data=folder, id=f"{flags.id}-synthetic")
        sources = {dataset: synthetic_source(dataset) for dataset in _not_packed(flags, recipes)}
    for dataset, source in sources.items():
        pack_set(source, dataset, flags.data)
    return flags


def _not_packed(flags: Flags, recipes: tuple[Recipe, ...]) -> list[str]:
    """Of the recipes, and of those that they start from."""
    from cluster.carry.plan import with_sources

    datasets = dict.fromkeys(recipe.dataset for recipe in with_sources(request_of(flags, recipes))[0])
    return [name for name in datasets if not storage.exists(shards.manifest_url(storage.join(flags.data, name)))]
