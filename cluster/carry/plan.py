"""A request -> the runs that it means, each with all that decides its result. Before Ray, before any training.

Reads manifests, and requests that lie under the id; writes nothing.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

import numpy as np

from imgcls import storage
from imgcls.catalogue import CATALOGUES
from imgcls.data.shards import check_shards, read_manifest, read_pixel_digests
from imgcls.data.splits import check_parts, fraction_note, split_ids
from imgcls.errors import CheckpointError, RecipeError
from imgcls.recipe import FromRun, Recipe, differing_fields
from imgcls.records import InitSource, LineageEntry, Manifest, RunConfig, RunOptions
from imgcls.runs import SuiteFolder
from imgcls.search import Search
from imgcls.training.lineage import Seen, refuse_seen_images

FROM_RUN = '{"kind": "from-run", "recipe": "resnet18"}'

if TYPE_CHECKING:
    from imgcls.training.weights import Model


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What a person asked for; the same for a single run and for a suite."""

    catalogue: str
    recipes: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    id: str
    data_url: str
    storage_url: str
    init_from: str | None = None
    options: RunOptions = RunOptions()
    retry_failed: bool = False
    search: Search | None = None
    """The recipes are its trials."""

    @property
    def suite(self) -> SuiteFolder:
        return SuiteFolder(storage.join(self.storage_url, self.id))


@dataclass(frozen=True, slots=True)
class Plan:
    configs: dict[str, RunConfig]
    """By name, in the order of the request."""
    manifests: dict[str, Manifest]
    """By data set."""
    notes: tuple[str, ...]
    tested: bool = True
    """False: trials of a search."""

    @property
    def sources(self) -> dict[str, str | None]:
        return {name: config.source_run for name, config in self.configs.items()}

    def decoded_sets(self, runs: Iterable[str]) -> list[tuple[Manifest, int, int]]:
        """Each (manifest, px, channels) that these runs train on, once."""
        recipes = [self.configs[run].recipe for run in runs]
        kinds = dict.fromkeys((recipe.dataset, recipe.input.stored_px, recipe.input.channels) for recipe in recipes)
        return [(self.manifests[dataset], px, channels) for dataset, px, channels in kinds]

    @property
    def synthetic(self) -> bool:
        return any(config.synthetic for config in self.configs.values())


def make_plan(request: Request) -> Plan:
    """Raises RecipeError, DataError or CheckpointError for all that can be known to be wrong before training."""
    recipes, notes = with_sources(request)
    urls = {recipe.dataset: storage.join(request.data_url, recipe.dataset) for recipe in recipes}
    manifests = {dataset: read_manifest(url) for dataset, url in urls.items()}
    for dataset, url in urls.items():
        check_shards(url, manifests[dataset])
    for recipe in recipes:
        _check_repeatable(recipe)
        splits = split_ids(recipe, manifests[recipe.dataset])
        check_parts(recipe, len(splits.train), world_size=request.options.num_workers)
        notes += filter(None, [fraction_note(recipe, splits)])
    given = _find_model(request.init_from) if request.init_from else None
    configs: dict[str, RunConfig] = {}
    ordered = _sources_first(recipes)
    for seed in request.seeds:
        for recipe in ordered:
            config = _config(request.catalogue, recipe, seed, manifests[recipe.dataset], configs, given)
            configs[config.name] = config
    _check_lineage(ordered, urls, manifests, given)
    wanted = [f"{recipe.name}-seed{seed}" for seed in request.seeds for recipe in recipes]
    return Plan({name: configs[name] for name in wanted}, manifests, tuple(notes), tested=request.search is None)


def with_sources(request: Request) -> tuple[list[Recipe], list[str]]:
    """The recipes asked for, and the source of each that starts from another run."""
    recipes, notes = list(request.recipes), list[str]()
    names = [recipe.name for recipe in recipes]
    if len(set(names)) < len(names):
        raise RecipeError(f"two recipes have the same name: {', '.join(names)}")
    if request.init_from:
        if not any(isinstance(recipe.init, FromRun) for recipe in recipes):
            remedy = f"--recipes finetuned, or --set 'init={FROM_RUN}'"
            raise RecipeError(f"--init-from: {', '.join(names)} starts from scratch\n  do: {remedy}")
        return recipes, notes
    for recipe in recipes:  # grows while it is walked: a source may have a source
        if isinstance(recipe.init, FromRun) and recipe.init.recipe not in {r.name for r in recipes}:
            name = recipe.init.recipe
            before = request.suite.run(f"{name}-seed{request.seeds[0]}").config()
            if before is None:
                notes.append(f"{recipe.name} starts from {name}, which is added")
            recipes.append(before.recipe if before else _catalogued(request.catalogue, name, needed_by=recipe.name))
    return recipes, notes


def _catalogued(catalogue: str, name: str, *, needed_by: str) -> Recipe:
    by_name = {recipe.name: recipe for recipe in CATALOGUES[catalogue]}
    if name not in by_name:
        raise RecipeError(
            f"recipe {needed_by} starts from {name}, which is neither under this id nor in the catalogue {catalogue} "
            f"({', '.join(by_name)})\n  do: name a source with --init-from CHECKPOINT, or --set init.recipe="
        )
    return by_name[name]


def _check_repeatable(recipe: Recipe) -> None:
    """A gradient of oneDNN's (torch 2.14, CPU) for a strided convolution of single pixels has other bits each time."""
    if recipe.model.kind == "resnet18" and recipe.precision == "bf16" and recipe.input.px <= 16:
        raise RecipeError(
            f"recipe {recipe.name}: resnet18 in bf16 is repeatable from 17 px on, input.px is {recipe.input.px}\n"
            "  do: a larger --set input.px=, or --set precision=fp32"
        )


def _sources_first(recipes: Sequence[Recipe]) -> list[Recipe]:
    by_name = {recipe.name: recipe for recipe in recipes}
    sources = {recipe.name: [recipe.init.recipe] if isinstance(recipe.init, FromRun) else [] for recipe in recipes}
    try:
        return [by_name[name] for name in TopologicalSorter(sources).static_order() if name in by_name]
    except CycleError as error:
        raise RecipeError(f"recipes start from each other in a circle: {' -> '.join(reversed(error.args[1]))}") from None


def _find_model(checkpoint: str) -> "Model":
    from imgcls.training.weights import find_model  # torch: only where weights are named

    return find_model(storage.absolute(checkpoint))


def _config(
    catalogue: str, recipe: Recipe, seed: int, manifest: Manifest, configs: dict[str, RunConfig], given: "Model | None"
) -> RunConfig:
    """With where its first weights come from, None for scratch; synthetic too where they were trained on no photographs."""
    init, synthetic = None, manifest.synthetic
    if isinstance(recipe.init, FromRun) and given is not None:
        init, synthetic = InitSource(run=given.url, identity=given.weights_sha256), synthetic or given.synthetic
    elif isinstance(recipe.init, FromRun):
        source = configs[f"{recipe.init.recipe}-seed{seed}"]
        init, synthetic = InitSource(run=source.name, identity=source.digest()), synthetic or source.synthetic
    return RunConfig(
        catalogue=catalogue, recipe=recipe, seed=seed, data_digest=manifest.digest, init=init, synthetic=synthetic
    )


def _check_lineage(
    recipes: Sequence[Recipe], urls: dict[str, str], manifests: dict[str, Manifest], given: "Model | None"
) -> None:
    """What `fit` will ask of the source's weights, asked now: no ancestor shares a name or an image with the target.

    recipes: sources first.
    """
    pixels = {dataset: np.sort(read_pixel_digests(url, manifests[dataset])) for dataset, url in urls.items()}
    starts = dict[str, tuple[Recipe, tuple[Seen, ...]]]()
    """By a source's name its recipe, and what it and its ancestors have seen."""
    for recipe in recipes:
        lineage: tuple[Seen, ...] = ()
        if isinstance(recipe.init, FromRun):
            source = recipe.init.recipe if given is None else given.url
            start, lineage = starts[source] if given is None else (given.recipe, given.lineage)
            _check_start(recipe, start, source=source)
            refuse_seen_images(lineage, source=source, dataset=recipe.dataset, pixels=pixels[recipe.dataset])
        entry = LineageEntry(dataset=recipe.dataset, digest=manifests[recipe.dataset].digest, run=recipe.name)
        starts[recipe.name] = recipe, (*lineage, Seen(entry, pixels[recipe.dataset]))


def _check_start(recipe: Recipe, start: Recipe, *, source: str) -> None:
    """The features of `start` fit into `recipe`'s network: `resnet18.transferred` will be asked for it."""
    kinds, channels = (start.model.kind, recipe.model.kind), (start.input.channels, recipe.input.channels)
    if kinds != ("resnet18", "resnet18") or channels == (3, 1):
        raise RecipeError(
            f"recipe {recipe.name}: a {kinds[1]} of {channels[1]} channels cannot start from {source}, a {kinds[0]} of "
            f"{channels[0]} channels\n  do: start from a resnet18 that is gray, or has as many channels"
        )


def check_alike(there: Mapping[str, RunConfig], request: Request, plan: Plan) -> None:
    """What lies under the id already agrees with the plan. Raises CheckpointError.

    A run of the same name is the same request; runs of one recipe differ in their seeds alone: the page pools them.
    """
    for name, config in plan.configs.items():
        for other in there.values():
            if other.name == name and other.digest() != config.digest():
                raise CheckpointError(_not_alike(request.suite.run(name).url, other, config, "is a run of another request"))
            if other.recipe.name == config.recipe.name and other.settings() != config.settings():
                what = f"has other settings than {name}: under one id, runs of a recipe may differ only in their seed"
                raise CheckpointError(_not_alike(request.suite.run(other.name).url, other, config, what))


def check_search(request: Request) -> None:
    """Under an id are trials of one search, however many, or no trials. Raises CheckpointError."""
    record = request.suite.record()
    if record is not None and _endless(record.search) != _endless(request.search):
        what = "trials of a search" if record.search else "runs that are no trials"
        raise CheckpointError(f"{request.suite.url} holds {what}, and this is another request\n  do: take another --id")


def _endless(search: Search | None) -> Search | None:
    return search and replace(search, num_trials=1)


def _not_alike(url: str, there: RunConfig, here: RunConfig, what: str) -> str:
    fields = differing_fields(there.settings(), here.settings()) or ["init: weights of another run"]
    do = "do: take another --id, or the request that it was begun with"
    return "\n  ".join([f"{url} {what}; there / here:", *fields[:6], do])
