"""Draw a suite's page and table again, from its records; or compare two suites."""

from typing import Annotated

import tyro

from imgcls import storage
from imgcls.errors import RecipeError, StorageError
from imgcls.runs import SuiteFolder
from jobs._door import DONE, enter
from jobs._request import checked_name, place
from jobs._terminal import Lines, say_results, say_table


def report(
    id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ID")],
    other: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="OTHER")] = None,
    /,
    storage_url: Annotated[str, tyro.conf.arg(name="storage")] = "runs",
    mlflow: Annotated[str | None, tyro.conf.arg(metavar="URI")] = None,
    verbose: bool = False,
) -> int:
    """Draw a suite's page and table again, from its records; or compare it with another suite, recipe by recipe.

    Args:
        id: Name of the suite, as `quick`.
        other: Name of the suite that it is compared with.
        storage_url: Folder or URL where runs leave what they found.
        mlflow: Tracking server on which the runs are logged too; what is there already is not logged again.
        verbose: Tracebacks too.
    """
    root = place(storage_url, "--storage")
    first, *others = (checked_name(name, what) for name, what in ((id, "ID"), (other, "OTHER")) if name is not None)
    storage.check_places(reads=[root], writes=[] if others else [root])
    suite = _suite(root, first)
    if others and mlflow is not None:
        raise RecipeError("--mlflow logs one suite\n  do: leave OTHER out")
    if others:
        return _compare(suite, _suite(root, *others))
    results = suite.publish()
    if mlflow is not None:
        suite.log_to_mlflow(results, mlflow)
    say_results(lines := Lines(synthetic=results.synthetic), results)
    lines.say(f"page: {storage.shown(suite.page_url)}")
    return DONE


def _suite(root: str, id: str) -> SuiteFolder:
    suite = SuiteFolder(storage.join(root, id))
    if not storage.exists(suite.record_url):
        lacks = f"holds no suite: no {storage.name_of(suite.record_url)}"
        there = ", ".join(storage.folders(root)) or "nothing"
        raise StorageError(f"{suite.url} {lacks}\n  do: name one of what is there: {there}")
    return suite


def _compare(suite: SuiteFolder, other: SuiteFolder) -> int:
    from imgcls.results.compare import beside, read_predictions

    a, b = suite.results(), other.results()
    rows = beside(a, read_predictions(suite.predictions(a)), b, read_predictions(other.predictions(b)))
    say_table(Lines(synthetic=a.synthetic or b.synthetic), rows)
    return DONE


if __name__ == "__main__":
    enter(report)
