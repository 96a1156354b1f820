"""Train pieces of a finished run again, and compare them with what it left."""

import secrets
from typing import Annotated

import tyro

from imgcls import storage
from imgcls.errors import RecipeError
from imgcls.runs import RunFolder
from jobs._door import DONE, SOME_FAILED, enter
from jobs._request import place
from jobs._terminal import Lines


def audit(
    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")],
    data: str = "data/packed",
    pieces: int = 3,
    seed: int | None = None,
    record: bool = False,
    verbose: bool = False,
) -> int:
    """Check a finished run: train pieces of it again, between two of its checkpoints, and test its model again.

    Args:
        run: The run's folder; a path or a URL.
        data: Folder or URL of packed sets.
        pieces: So many are drawn of those that its checkpoints leave; all where there are no more.
        seed: By which they are drawn; a new one unless given.
        record: Put what was found into the run's folder; jobs.report draws the page with it.
        verbose: Lightning's own lines too, and tracebacks.
    """
    from cluster.carry.run import silence_libraries
    from imgcls.training import audit as audits

    if pieces < 1:
        raise RecipeError(f"--pieces {pieces}: at least one has to be trained again")
    folder, data = RunFolder(place(run, "RUN")), place(data, "--data")
    storage.check_places(reads=[folder.url, data], writes=[folder.url] if record else [])
    silence_libraries(verbose)
    found = audits.audit(folder, data_url=data, num_pieces=pieces, seed=secrets.randbelow(10**6) if seed is None else seed)
    if record:
        folder.keep_audit(found)
    synthetic = bool((config := folder.config()) and config.synthetic)
    Lines(synthetic=synthetic).say(f"{folder.name}: {'DIFFERS: ' * bool(found.difference)}{found.told}")
    return SOME_FAILED if found.difference else DONE


if __name__ == "__main__":
    enter(audit)
