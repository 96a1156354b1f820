"""Draw a suite's page and table again, from its records."""

from typing import Annotated

import tyro

from imgcls import storage
from imgcls.errors import StorageError
from imgcls.runs import SuiteFolder
from jobs._door import DONE, enter
from jobs._request import checked_name, place
from jobs._terminal import Lines, say_results


def report(
    id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ID")],
    storage_url: Annotated[str, tyro.conf.arg(name="storage")] = "runs",
    verbose: bool = False,
) -> int:
    """Draw a suite's page and table again, from its records.

    Args:
        id: Name of the suite, as `quick`.
        storage_url: Folder or URL where runs leave what they found.
        verbose: Tracebacks too.
    """
    suite = SuiteFolder(storage.join(place(storage_url, "--storage"), checked_name(id, "ID")))
    storage.check_places(writes=[storage_url])
    if not storage.exists(suite.record_url):
        there = ", ".join(storage.folders(storage_url)) or "nothing"
        raise StorageError(
            f"{suite.url} holds no suite: no {storage.name_of(suite.record_url)}\n  do: name one of what is there: {there}"
        )
    results = suite.publish()
    lines = Lines(synthetic=results.synthetic)
    say_results(lines, results)
    lines.say(f"page: {storage.shown(suite.page_url)}")
    return DONE


if __name__ == "__main__":
    enter(report)
