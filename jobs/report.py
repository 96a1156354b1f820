"""Draw a suite's page and table again, from its records; or compare two suites."""

from collections.abc import Mapping
from statistics import mean
from typing import Annotated, Any

import tyro

from imgcls import storage
from imgcls.errors import StorageError
from imgcls.records import SuiteResults
from imgcls.runs import SuiteFolder
from jobs._door import DONE, enter
from jobs._request import checked_name, place
from jobs._terminal import Lines, say_results, say_table


def report(
    id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ID")],
    other: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="OTHER")] = None,
    /,
    storage_url: Annotated[str, tyro.conf.arg(name="storage")] = "runs",
    verbose: bool = False,
) -> int:
    """Draw a suite's page and table again, from its records; or compare it with another suite, recipe by recipe.

    Args:
        id: Name of the suite, as `quick`.
        other: Name of the suite that it is compared with.
        storage_url: Folder or URL where runs leave what they found.
        verbose: Tracebacks too.
    """
    root = place(storage_url, "--storage")
    first, *others = (checked_name(name, what) for name, what in ((id, "ID"), (other, "OTHER")) if name is not None)
    storage.check_places(reads=[root], writes=[] if others else [root])
    suite = _suite(root, first)
    if others:
        return _compare(suite, _suite(root, *others))
    results = suite.publish()
    lines = Lines(synthetic=results.synthetic)
    say_results(lines, results)
    lines.say(f"page: {storage.shown(suite.page_url)}")
    return DONE


def _suite(root: str, id: str) -> SuiteFolder:
    suite = SuiteFolder(storage.join(root, id))
    if not storage.exists(suite.record_url):
        there = ", ".join(storage.folders(root)) or "nothing"
        raise StorageError(
            f"{suite.url} holds no suite: no {storage.name_of(suite.record_url)}\n  do: name one of what is there: {there}"
        )
    return suite


def _compare(suite: SuiteFolder, other: SuiteFolder) -> int:
    from imgcls.results.compare import read_predictions

    a, b = suite.results(seconds=0.0, command=""), other.results(seconds=0.0, command="")
    rows = beside(a, read_predictions(suite.predictions(a)), b, read_predictions(other.predictions(b)))
    say_table(Lines(synthetic=a.synthetic or b.synthetic), rows)
    return DONE


def beside(a: SuiteResults, of_a: Mapping[str, Any], b: SuiteResults, of_b: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Two suites, under a header: each recipe's accuracy in both, by the seeds of both, and `b` minus `a`."""
    from imgcls.results.compare import NOT_PAIRED, groups, paired, verdict_of

    rows: list[tuple[str, ...]] = [("recipe", "seeds", "test n", a.id, b.id, "difference", "95%", "verdict")]
    for name in dict.fromkeys(run.recipe.name for run in (*a.runs, *b.runs)):
        ours, theirs = groups(a, name), groups(b, name)
        alone = len(ours) == len(theirs) == 1
        second, first, gap = paired(theirs[0], of_b, ours[0], of_a) if alone else ([], [], None)
        if gap is None:
            why = NOT_PAIRED if alone else "it is not finished in both, or has several settings in one"
            rows.append((name, *[""] * 6, f"not compared: {why}"))
            continue
        means = (f"{mean([run.test.accuracy for run in runs if run.test]):.4f}" for runs in (first, second))
        count = first[0].test.num_samples if first[0].test else 0
        interval = f"{gap.low:+.4f} to {gap.high:+.4f}"
        verdict = verdict_of(gap, b.id, a.id)
        rows.append((name, f"{len(first)}", f"{count:,}", *means, f"{gap.center:+.4f}", interval, verdict))
    return rows


if __name__ == "__main__":
    enter(report)
