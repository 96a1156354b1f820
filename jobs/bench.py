"""Records of figures: write one from a suite's results, and the README's tables from all of them."""

import re
from pathlib import Path
from typing import Annotated, Literal

import tyro

from imgcls import records, storage
from imgcls.errors import RecipeError
from imgcls.records import SuiteResults
from imgcls.results.measurement import markdown_table, measure, newest
from jobs._door import DONE, enter
from jobs._request import checked_name
from jobs._terminal import Lines

MEASUREMENTS = Path("docs/measurements")
ROOT = Path(__file__).parent.parent


def bench(
    what: Annotated[tyro.conf.Positional[Literal["record", "readme"]], tyro.conf.arg(metavar="WHAT")],
    id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ID")] = "",
    storage_url: Annotated[str, tyro.conf.arg(name="storage")] = "runs",
    verbose: bool = False,
) -> int:
    """Write a record of a suite's figures, or the README's tables from the records.

    Args:
        what: `record ID` writes docs/measurements/suite-<catalogue>_<hardware>_<date>.json; `readme` the README's tables.
        id: Name of the suite, as `quick`.
        storage_url: Folder or URL where runs leave what they found.
        verbose: Tracebacks too.
    """
    if what == "record":
        if not id:
            raise RecipeError("bench record needs the ID of a suite, as quick")
        found = measure(records.read(SuiteResults, storage.join(storage_url, checked_name(id, "ID"), "results.json")))
        path = MEASUREMENTS / found.file_name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found.to_bytes())
        Lines().say(f"wrote {path}")
        return DONE
    readme = Path("README.md")
    readme.write_text(with_tables(readme.read_text()))
    Lines().say(f"wrote {readme}")
    return DONE


def with_tables(readme: str) -> str:
    """The text with each table between `<!-- table SUBJECT -->` and `<!-- end -->` as the newest record has it."""

    def table(match: re.Match[str]) -> str:
        subject = match[1]
        content = markdown_table(newest(ROOT / MEASUREMENTS, subject))
        return f"<!-- table {subject} -->\n{content}\n<!-- end -->"

    return re.sub(r"<!-- table ([\w-]+) -->\n.*?<!-- end -->", table, readme, flags=re.DOTALL)


if __name__ == "__main__":
    enter(bench)
