import io

from rich.console import Console

from jobs import _terminal
from jobs._terminal import Lines, SuiteView


def test_the_time_left_counts_from_the_first_step_that_this_attempt_took(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(_terminal.time, "monotonic", lambda: now)
    lines = Lines()
    lines.console = Console(file=io.StringIO(), width=200)
    view = SuiteView(lines, {"scratch-seed0": None})
    view.started("scratch-seed0")
    train = {"phase": "train", "epoch": 3, "epochs": 5, "total_steps": 500, "images_per_s": 80.0, "tries": 1}
    now += 60  # imports and cache
    view.progress("scratch-seed0", train | {"step": 200})
    now += 10
    row = {"epoch": 3, "train/loss": 1.0, "val/loss": 1.0, "val/accuracy": 0.5}
    view.progress("scratch-seed0", train | {"step": 300, "row": row})
    assert "about 20 s left" in lines.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_run_that_is_begun_again_says_so_once_also_where_its_first_worker_reported_nothing():
    lines = Lines()
    lines.console = Console(file=io.StringIO(), width=200)
    view = SuiteView(lines, {"scratch-seed0": None})
    view.started("scratch-seed0")
    for phase in ("cache", "start"):
        view.progress("scratch-seed0", {"phase": phase, "tries": 2})
    assert lines.console.file.getvalue().count("begun again") == 1  # pyright: ignore[reportAttributeAccessIssue]


def test_what_a_run_waits_for_is_shown_and_logged():
    lines = Lines()
    lines.console = Console(file=io.StringIO(), width=200)
    view = SuiteView(lines, {"resnet18-seed0": None, "finetuned-seed0": "resnet18-seed0"})

    def states() -> list[str]:
        return [str(row["state"]) for row in view.rows.values()]

    assert states() == ["Ray starts", "Ray starts"]
    view.connected()
    assert states() == ["waits for room", "waits for resnet18-seed0"]
    view.started("resnet18-seed0")
    assert states()[0] == "workers start"
    for phase in ("workers import", "cache", "start"):
        view.progress("resnet18-seed0", {"phase": phase, "tries": 1})
        assert states()[0] == phase
    said = lines.console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert said.splitlines() == [f"resnet18-seed0: {what}" for what in ("started", "workers import", "cache")]
