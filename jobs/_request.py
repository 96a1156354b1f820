"""The flags that `train` and `suite` share, and the way from them to results."""

import json
import shlex
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import Field

from cluster import session
from cluster.send.staging import check_lasting
from imgcls import storage
from imgcls.catalogue import recipe_of, suite_of
from imgcls.data.archives import printable
from imgcls.errors import RecipeError
from imgcls.recipe import Recipe, Seed, Strict, derive, digest_of, parse_changes, recipe_from_json
from imgcls.records import RunOptions, check_flags
from imgcls.runs import RunFolder, SuiteFolder
from imgcls.search import Search
from jobs._door import DONE, SOME_FAILED
from jobs._terminal import Lines, SuiteView, say_results, say_work

if TYPE_CHECKING:
    from cluster.carry.plan import Request

NO_NAME = r'/\:*?"<>|[]{}%#'
"""What URLs, patterns and file systems read as more than a letter."""


@dataclass(frozen=True, kw_only=True)
class Flags(Strict):
    catalogue: str = "quick"
    """quick, paper, tuned, choices or transfer."""
    data: str = "data/packed"
    """Folder or URL of packed sets; a set is <data>/<dataset>/."""
    storage: str = "runs"
    """Folder or URL for what runs leave; a run is <storage>/<id>/<recipe>-seed<N>/."""
    id: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    """Name of the suite; the catalogue's, with 8 hex of the changes where --set or --recipe changes something."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE"), tyro.conf.UseAppendAction] = ()
    """Change a field of the recipe by its path, as optimizer.lr=0.01."""
    recipe: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE"), tyro.conf.UseAppendAction] = ()
    """A recipe from a TOML file, or from a run's configuration, in place of one from the catalogue; a path or a URL."""
    seed: Seed = 0
    """The first seed."""
    num_seeds: tyro.conf.Suppress[Annotated[int, Field(ge=1)]] = 1
    init_from: Annotated[str | None, tyro.conf.arg(metavar="CHECKPOINT")] = None
    """Start from these weights: a run's folder, a checkpoint or a model file."""
    options: tyro.conf.OmitArgPrefixes[RunOptions] = RunOptions()
    retry_failed: bool = False
    """Try runs again that failed."""
    dry_run: bool = False
    """Say what would be done, fetched, taken and paid; nothing is started."""
    prices: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """With --dry-run: what a node of each type costs, as YAML."""
    cluster: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """With --dry-run: count on the nodes of this definition, one of Ray's launcher, a RayCluster or a RayJob."""


def chosen(flags: Flags, names: tuple[str, ...] | None) -> tuple[Flags, tuple[Recipe, ...]]:
    """The flags with their id, and the catalogue's recipes of these names (None: all), or those from files, as changed.

    The id is --id, else the catalogue's name, or `<catalogue>-<8 hex of the changes>`; never of time.
    """
    check_flags(flags)
    if (flags.prices or flags.cluster) and not flags.dry_run:
        raise RecipeError("--prices and --cluster say what --dry-run counts on\n  do: give --dry-run too, or leave them out")
    suite_of(flags.catalogue)
    if flags.recipe and names is not None:
        raise RecipeError(f"{', '.join(names)} and --recipe {flags.recipe[0]}: give one or the other")
    files = [_from_file(path) for path in flags.recipe]
    named = [recipe_of(flags.catalogue, name) for name in names or ()]
    bases = named or files or suite_of(flags.catalogue)
    changes = parse_changes(flags.set)
    recipes = tuple(derive(base, changes) for base in bases)
    id = flags.catalogue
    if files or recipes != tuple(bases):
        id += f"-{digest_of([changes, [recipe.to_json() for recipe in files]])[:8]}"
    return replace(flags, id=checked_name(flags.id, "--id") if flags.id is not None else id), recipes


def chosen_one(flags: Flags, name: str | None) -> tuple[Flags, tuple[Recipe, ...]]:
    """As `chosen`, where one recipe is wanted: the catalogue's of this name, or that of a file."""
    if name is None and len(flags.recipe) != 1:
        raise RecipeError("give one RECIPE, as basic-cnn, or one --recipe FILE")
    return chosen(flags, None if name is None else (name,))


def _from_file(path: str) -> Recipe:
    try:
        data = Path(storage.absolute(path)).read_bytes() if storage.is_local(path) else storage.read_bytes(path)
        value = json.loads(data)["recipe"] if path.endswith(".json") else tomllib.loads(data.decode())
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(f"--recipe {path} cannot be read as TOML, or a run's {RunFolder.CONFIG}: {error}") from None
    return recipe_from_json(value, where=str(path))


def place(url: str, flag: str) -> str:
    """The same place from any working folder. Raises RecipeError where it would go away with the job that this runs in."""
    if session.in_job():
        check_lasting(flag, url)
    url = storage.absolute(url)
    if not url.isprintable():
        raise RecipeError(f"{flag} {printable(url)}: records hold this path, and it cannot be printed\n  do: name another")
    return url


def request_of(flags: Flags, recipes: tuple[Recipe, ...], search: Search | None = None) -> "Request":
    """`flags` and `recipes` as `chosen` returns them. search: whose trials they are."""
    from cluster.carry.plan import Request

    assert flags.id is not None
    return Request(
        catalogue=flags.catalogue,
        recipes=recipes,
        seeds=tuple(range(flags.seed, flags.seed + flags.num_seeds)),
        id=flags.id,
        data_url=place(flags.data, "--data"),
        storage_url=place(flags.storage, "--storage"),
        init_from=flags.init_from,
        options=flags.options,
        retry_failed=flags.retry_failed,
        search=search,
    )


def carry_out(flags: Flags, recipes: tuple[Recipe, ...], search: Search | None = None) -> int:
    """Plans, runs, prints; the exit code. Parameters as those of `request_of`."""
    from cluster.carry.plan import make_plan
    from cluster.carry.suite import run_suite

    request = request_of(flags, recipes, search)
    reads = [request.data_url, *([place(flags.init_from, "--init-from")] if flags.init_from else []), request.storage_url]
    storage.check_places(reads=reads, writes=[] if flags.dry_run else [request.storage_url])
    plan = make_plan(request)
    lines = Lines(synthetic=plan.synthetic)
    for note in plan.notes:
        lines.say(note)
    if flags.dry_run:
        from jobs._forecast import say_plan

        return say_plan(lines, request, plan, flags.prices, flags.cluster)
    view, command = SuiteView(lines, plan.sources), f"jobs.{Path(sys.argv[0]).stem}"
    with view.shown():
        results = run_suite(request, plan, view=view, command=shlex.join(["python", "-m", command, *sys.argv[1:]]))
    lines = Lines(synthetic=results.synthetic)
    say_results(lines, results)
    if results.took:
        say_work(lines, results)
    if best := search and results.best:
        from imgcls.results.compare import command_of_best

        lines.say(f"best: {best.name}; this trains and tests it:\n  {command_of_best(results)}")
    lines.say(f"page: {SuiteFolder(results.url).page_url}")
    # Other trials than the best may diverge.
    return DONE if best or plan.configs.keys() <= {run.name for run in results.finished} else SOME_FAILED


def checked_name(text: str, what: str) -> str:
    """A name that can be a folder's and a part of a URL. Raises RecipeError."""
    if not text or text.startswith(".") or not text.isprintable() or set(text) & set(NO_NAME):
        raise RecipeError(f"{what} {text!r}: a plain name, without {NO_NAME} and not beginning with a dot")
    return text
