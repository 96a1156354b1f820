"""What several commands under one id leave each other."""

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.carry.plan import Plan, Request, make_plan
from cluster.carry.suite import write_down
from imgcls.catalogue import quick
from imgcls.errors import CheckpointError
from imgcls.recipe import Recipe, derive
from imgcls.records import RunResult
from imgcls.results import page

TINY = {"global_batch_size": 16, "train_fraction": 1.0}
BASIC_CNN, SCRATCH = derive(quick.BASIC_CNN, TINY), derive(quick.SCRATCH, TINY)


@pytest.fixture
def asked(packed: Path, tmp_path: Path):
    def make(recipe: Recipe, seed: int = 0) -> tuple[Request, Plan]:
        request = Request(
            catalogue="quick",
            recipes=(recipe,),
            seeds=(seed,),
            id="one",
            data_url=str(packed),
            storage_url=str(tmp_path / "runs"),
        )
        return request, make_plan(request)

    return make


def fails(request: Request, plan: Plan) -> None:
    for name, config in plan.configs.items():
        result = RunResult.of(config, status="failed", error="planted")
        request.suite.run(name).finish(result)


def test_two_commands_that_planned_before_either_wrote_lose_no_run(asked):
    (one, its_plan), (two, other_plan) = asked(SCRATCH), asked(BASIC_CNN)
    write_down(one, its_plan)
    write_down(two, other_plan)
    assert list(one.suite.configs()) == ["basic-cnn-seed0", "scratch-seed0"]  # as the catalogue has them
    assert [run.status for run in one.suite.publish().runs] == ["open", "open"]


def test_of_two_commands_with_other_settings_for_one_recipe_the_second_is_refused_and_deletes_its_config(asked):
    one, its_plan = asked(SCRATCH)
    other = asked(derive(SCRATCH, {"optimizer.lr": 0.5}), seed=1)
    write_down(one, its_plan)
    with pytest.raises(CheckpointError, match="may differ only in their seed"):
        write_down(*other)
    assert list(one.suite.configs()) == ["scratch-seed0"]
    write_down(*asked(SCRATCH, seed=1))


def test_a_run_that_ends_while_a_command_writes_the_page_is_on_it(asked, monkeypatch: pytest.MonkeyPatch):
    (one, its_plan), (two, other_plan) = asked(SCRATCH), asked(BASIC_CNN)
    write_down(one, its_plan)
    write_down(two, other_plan)
    render, rendered = page.render, []

    def while_it_ends(results, *files) -> str:
        if not rendered:
            fails(two, other_plan)  # between our look and our write
        rendered.append([run.status for run in results.runs])
        return render(results, *files)

    monkeypatch.setattr(page, "render", while_it_ends)
    fails(one, its_plan)
    results = one.suite.publish()
    assert rendered == [["open", "failed"], ["failed", "failed"]]
    assert [run.status for run in results.runs] == ["failed", "failed"]


def test_results_say_what_was_asked_for_in_the_order_of_seeds(asked):
    for seed in (10, 2):
        request, plan = asked(replace(SCRATCH), seed=seed)
        write_down(request, plan)
    assert list(request.suite.configs()) == ["scratch-seed2", "scratch-seed10"]
