"""The flags that `train` and `suite` share, and the way from them to results."""

import json
import shlex
import sys
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from cluster import session
from cluster.staging import is_lasting, relative
from imgcls import storage
from imgcls.catalogue import recipe_of, suite_of
from imgcls.data.archives import printable
from imgcls.errors import RecipeError
from imgcls.recipe import Recipe, derive, digest_of, parse_changes, recipe_from_json
from imgcls.records import Keeping
from jobs._door import DONE, SOME_FAILED
from jobs._terminal import Lines, SuiteView, say_results, say_work

NO_NAME = r'/\:*?"<>|[]{}%#'
"""What URLs, patterns and file systems read as more than a letter."""


@dataclass(frozen=True, kw_only=True)
class Flags:
    catalogue: str = "quick"
    """quick, paper or tuned."""
    data: str = "data/packed"
    """Folder or URL of packed sets; a set is <data>/<dataset>/."""
    storage: str = "runs"
    """Folder or URL for what runs leave; a run is <storage>/<id>/<recipe>-seed<N>/."""
    id: Annotated[str | None, tyro.conf.arg(metavar="ID")] = None
    """Name of the suite; the catalogue's, with 8 hex of the changes where --set or --recipe changes something."""
    set: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FIELD=VALUE"), tyro.conf.UseAppendAction] = ()
    """Change a field of the recipe by its path, as optimizer.lr=0.01."""
    recipe: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE"), tyro.conf.UseAppendAction] = ()
    """A recipe from a TOML file, or a run's config.json, in place of one from the catalogue."""
    seed: int = 0
    """The first seed."""
    init_from: Annotated[str | None, tyro.conf.arg(metavar="CHECKPOINT")] = None
    """Start from these weights: a run's folder, a checkpoint or a model.pt."""
    num_workers: int = 1
    """Workers of each run; two or more is DDP."""
    cpus_per_worker: Annotated[float | None, tyro.conf.arg(metavar="F")] = None
    """One unless said."""
    gpus_per_worker: Annotated[float | None, tyro.conf.arg(metavar="F")] = None
    """One where there are GPUs, else none."""
    checkpoint_every_n_steps: Annotated[int | None, tyro.conf.arg(metavar="N")] = None
    """Beside the checkpoint at every epoch's end; what is lost to a kill is at most this many steps."""
    checkpoint_keep: int = 0
    """So many recent checkpoints stay beside the best and the last."""
    checkpoint_budget_mb: Annotated[float | None, tyro.conf.arg(metavar="MB")] = None
    """Of one run's checkpoints; recent ones go until it holds, the best and the last always stay."""
    accept_different_numerics: bool = False
    """Go on with runs that stopped under other library versions, hardware, threads or number of workers."""
    max_failures: int = 3
    """How often a run is begun again after a worker or its controller died; preempted nodes do not count."""
    hang_timeout_s: float = 120.0
    """A worker that does not answer, or a collective that does not end, is a failure after so many seconds."""
    retry_failed: bool = False
    """Try runs again that failed."""
    dry_run: bool = False
    """Say what would be done, fetched, taken and paid; nothing is started."""
    prices: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """With --dry-run: what a node of each type costs, as YAML."""
    verbose: bool = False
    """Ray's and Lightning's own lines too, and tracebacks."""


def chosen(flags: Flags, names: tuple[str, ...] | None) -> tuple[Flags, tuple[Recipe, ...]]:
    """The flags with their id, and the catalogue's recipes of these names (None: all), or those from files, as changed.

    The id is --id, else the catalogue's name, or `<catalogue>-<8 hex of the changes>`; never of time.
    """
    suite_of(flags.catalogue)
    if flags.recipe and names is not None:
        raise RecipeError(f"{', '.join(names)} and --recipe {flags.recipe[0]}: give one or the other")
    files = [_from_file(path) for path in flags.recipe]
    named = [recipe_of(flags.catalogue, name) for name in names or ()]
    bases = named or files or suite_of(flags.catalogue)
    changes = parse_changes(flags.set)
    recipes = tuple(derive(base, changes) for base in bases)
    found = flags.catalogue
    if files or recipes != tuple(bases):
        found += f"-{digest_of([changes, [recipe.to_json() for recipe in files]])[:8]}"
    return replace(flags, id=checked_name(flags.id, "--id") if flags.id is not None else found), recipes


def _from_file(path: Path) -> Recipe:
    try:
        text = path.read_text(encoding="utf-8")
        value = json.loads(text)["recipe"] if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(f"--recipe {path} cannot be read as TOML, or a run's config.json: {error}") from None
    return recipe_from_json(value, where=str(path))


def place(url: str, flag: str) -> str:
    """The same place from any working folder. Raises RecipeError where it would go away with the job that this runs in."""
    if session.in_job() and not is_lasting(url):
        raise RecipeError(relative(flag, url))
    found = storage.absolute(url)
    if not found.isprintable():
        raise RecipeError(f"{flag} {printable(found)}: records hold this path, and it cannot be printed\n  do: name another")
    return found


def carry_out(flags: Flags, recipes: tuple[Recipe, ...], *, num_seeds: int) -> int:
    """Plans, runs, prints; the exit code. `flags` and `recipes` as `chosen` returns them."""
    from cluster.plan import Request, make_plan
    from cluster.suite import run_suite

    assert flags.id is not None
    for flag, value, least in (
        ("--num-seeds", num_seeds, 1),
        ("--num-workers", flags.num_workers, 1),
        ("--seed", flags.seed, 0),
        ("--max-failures", flags.max_failures, 0),
        ("--checkpoint-every-n-steps", flags.checkpoint_every_n_steps, 1),
        ("--checkpoint-keep", flags.checkpoint_keep, 0),
        ("--checkpoint-budget-mb", flags.checkpoint_budget_mb, 0),
        ("--hang-timeout-s", flags.hang_timeout_s, 1),
    ):
        if value is not None and not value >= least:
            raise RecipeError(f"{flag} {value}: {'one' if least else 'zero'} or more")
    request = Request(
        catalogue=flags.catalogue,
        recipes=recipes,
        seeds=tuple(range(flags.seed, flags.seed + num_seeds)),
        id=flags.id,
        data_url=place(flags.data, "--data"),
        storage_url=place(flags.storage, "--storage"),
        init_from=flags.init_from,
        num_workers=flags.num_workers,
        cpus_per_worker=flags.cpus_per_worker,
        gpus_per_worker=flags.gpus_per_worker,
        keeping=Keeping(
            every_n_steps=flags.checkpoint_every_n_steps,
            num_recent=flags.checkpoint_keep,
            budget_bytes=None if flags.checkpoint_budget_mb is None else int(flags.checkpoint_budget_mb * 1e6),
        ),
        accept_different_numerics=flags.accept_different_numerics,
        max_failures=flags.max_failures,
        hang_timeout_s=flags.hang_timeout_s,
        retry_failed=flags.retry_failed,
        verbose=flags.verbose,
    )
    source = [place(flags.init_from, "--init-from")] if flags.init_from else []
    reads, writes = [request.data_url, *source], [request.storage_url]
    storage.check_places(reads=[*reads, *writes] if flags.dry_run else reads, writes=[] if flags.dry_run else writes)
    plan = make_plan(request)
    lines = Lines(synthetic=plan.synthetic)
    for note in plan.notes:
        lines.say(note)
    if flags.dry_run:
        from jobs._forecast import say_plan

        return say_plan(lines, request, plan, flags.prices)
    view = SuiteView(lines, plan.sources)
    with view.shown():
        results = run_suite(request, plan, view=view, command=_command())
    lines = Lines(synthetic=results.synthetic)
    say_results(lines, results)
    if results.took:
        say_work(lines, results)
    lines.say(f"page: {storage.join(results.url, 'report.html')}")
    return DONE if plan.configs.keys() <= {run.name for run in results.finished} else SOME_FAILED


def checked_name(text: str, what: str) -> str:
    """A name that can be a folder's and a part of a URL. Raises RecipeError."""
    if not text or text.startswith(".") or not text.isprintable() or set(text) & set(NO_NAME):
        raise RecipeError(f"{what} {text!r}: a plain name, without {NO_NAME} and not beginning with a dot")
    return text


def _command() -> str:
    module = Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", f"jobs.{module}", *sys.argv[1:]])
