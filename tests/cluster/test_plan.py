import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.carry.decide import Status, SuiteState
from cluster.carry.plan import Request, check_alike, make_plan
from cluster.foretell.forecast import runs_of
from imgcls import records
from imgcls.catalogue import quick
from imgcls.data import shards
from imgcls.data.sources import Source
from imgcls.data.synthetic import synthetic_source
from imgcls.errors import CheckpointError, DataError, RecipeError
from imgcls.rates import Rates
from imgcls.recipe import Recipe, derive
from imgcls.records import Placement, RunOptions
from imgcls.search import Search, space_of

TINY = {"global_batch_size": 16, "train_fraction": 1.0}
FIVE = tuple(derive(recipe, TINY) for recipe in quick.SUITE)
FINETUNED = FIVE[4]


@pytest.fixture
def request_of(packed: Path, tmp_path: Path):
    def make(*recipes: Recipe, **fields) -> Request:
        base = Request(
            catalogue="quick",
            recipes=recipes,
            seeds=(0,),
            id="quick",
            data_url=str(packed),
            storage_url=str(tmp_path / "runs"),
        )
        return replace(base, **fields)

    return make


def test_recipes_times_seeds_are_the_runs_and_the_fine_tuned_wait_for_their_own_seed(request_of):
    plan = make_plan(request_of(*FIVE, seeds=(0, 1)))
    assert len(plan.configs) == 10
    assert plan.sources["finetuned-seed1"] == "resnet18-seed1"
    assert plan.sources["scratch-seed1"] is None
    assert plan.synthetic


def test_resnet18_in_bf16_is_refused_where_its_gradients_are_not_repeatable(request_of):
    small = derive(quick.RESNET18, TINY | {"precision": "bf16", "input.px": 16})
    with pytest.raises(RecipeError, match="resnet18 in bf16 is repeatable from 17 px on"):
        make_plan(request_of(small))
    assert make_plan(request_of(derive(small, {"input.px": 17}))).configs


def test_a_missing_source_is_added_and_said(request_of):
    plan = make_plan(request_of(quick.FINETUNED, recipes=(derive(quick.FINETUNED, TINY),)))
    assert list(plan.configs) == ["finetuned-seed0", "resnet18-seed0"]
    assert plan.notes == ("finetuned starts from resnet18, which is added",)


def test_trials_of_a_search_are_predicted_without_a_test(request_of):
    search = Search(recipe=FIVE[0], space=space_of(FIVE[0]), num_trials=1)
    placement, evaluated = Placement(num_workers=1, cpus_per_worker=1, gpus_per_worker=0), []
    for request in (request_of(FIVE[0]), request_of(*search.trials(), search=search)):
        plan = make_plan(request)
        state = SuiteState(dict.fromkeys(plan.configs, Status.OPEN))
        evaluated += [run.evaluated_images for run in runs_of(plan, state, placement, Rates(), "here").values()]
    assert evaluated[0] - evaluated[1] == len(plan.manifests["imagenette"].labels("test"))


def test_who_trains_on_a_fifth_of_a_set_is_told_so(request_of):
    plan = make_plan(request_of(derive(quick.SCRATCH, {"global_batch_size": 16})))
    assert plan.notes == (
        "scratch trains on 20% of cifar10's training part (50 of 270); --set train_fraction=1.0 takes all",
    )


def test_a_source_that_lies_under_the_id_is_taken_as_it_is(request_of, tmp_path: Path):
    before = make_plan(request_of(derive(quick.RESNET18, TINY | {"length.epochs": 9}))).configs["resnet18-seed0"]
    records.write(before, str(tmp_path / "runs/quick/resnet18-seed0/config.json"))
    plan = make_plan(request_of(FINETUNED))
    assert plan.configs["resnet18-seed0"] == before
    assert plan.notes == ()


def test_the_placement_is_not_in_a_runs_digest(request_of):
    one, two = make_plan(request_of(*FIVE)), make_plan(request_of(*FIVE, options=RunOptions(num_workers=2, max_failures=9)))
    assert {n: c.digest() for n, c in one.configs.items()} == {n: c.digest() for n, c in two.configs.items()}


def test_a_run_of_the_same_name_with_another_digest_is_refused(request_of):
    there = make_plan(request_of(*FIVE)).configs
    changed = request_of(derive(FIVE[0], {"optimizer.lr": 0.5}))
    with pytest.raises(CheckpointError, match=r"is a run of another request; there / here:\n  recipe\.optimizer\.lr"):
        check_alike(there, changed, make_plan(changed))
    more = request_of(*FIVE, seeds=(0, 1))
    check_alike(there, more, make_plan(more))


@pytest.mark.parametrize("change", [{"optimizer.lr": 0.5}, {"length.epochs": 30}, {"dataset": "imagenette"}])
def test_another_seed_of_a_recipe_with_other_settings_is_refused_under_the_same_id(request_of, change: dict):
    there = make_plan(request_of(FIVE[3])).configs
    other = request_of(derive(FIVE[3], change), seeds=(1,), catalogue="paper")
    with pytest.raises(CheckpointError, match="has other settings than scratch-seed1: under one id"):
        check_alike(there, other, make_plan(other))


def test_a_source_that_cannot_fit_is_refused_before_it_trains(request_of):
    with pytest.raises(RecipeError, match="cannot start from basic-cnn, a basic-cnn of 1 channels"):
        make_plan(request_of(FIVE[0], derive(FINETUNED, {"init.recipe": "basic-cnn"})))
    gray = derive(FINETUNED, {"input.channels": 1, "name": "gray", "init.recipe": "rgb"})
    rgb = derive(FIVE[1], {"input.channels": 3, "name": "rgb"})
    with pytest.raises(RecipeError, match="a resnet18 of 1 channels cannot start from rgb, a resnet18 of 3 channels"):
        make_plan(request_of(rgb, gray))


def test_transfer_within_one_data_set_is_refused(request_of):
    with pytest.raises(CheckpointError, match=r"its lineage saw cifar10 .*shares 360 of 360 images"):
        make_plan(request_of(*(derive(recipe, {"dataset": "cifar10"}) for recipe in FIVE)))


def test_the_targets_images_under_another_name_are_found(request_of, packed: Path, tmp_path: Path):
    data = tmp_path / "data"
    shutil.copytree(packed / "cifar10", data / "cifar10")
    source = synthetic_source("cifar10", 300)
    renamed = Source("holiday", source.class_names, source.samples, (), "x", synthetic=True)
    shards.pack(renamed, str(data / "holiday"), name="holiday")
    resnet18 = derive(FIVE[1], {"dataset": "holiday"})
    with pytest.raises(CheckpointError, match=r"its lineage saw holiday .*shares 360 of 360 images"):
        make_plan(request_of(resnet18, FINETUNED, data_url=str(data)))


def test_what_can_be_known_to_be_wrong_is_refused_before_training(request_of, packed: Path, tmp_path: Path):
    with pytest.raises(RecipeError, match="8 workers; resnet18 needs 2"):
        make_plan(request_of(derive(FIVE[3], {"global_batch_size": 8}), options=RunOptions(num_workers=8)))
    with pytest.raises(DataError, match=r"no manifest\.json"):
        make_plan(request_of(derive(FIVE[3], {"dataset": "pets"})))
    copy = shutil.copytree(packed / "cifar10", tmp_path / "data" / "cifar10")
    (copy / "test-00000.tar").unlink()
    with pytest.raises(DataError, match=r"lacks test-00000\.tar"):
        make_plan(request_of(FIVE[3], data_url=str(tmp_path / "data")))
    with pytest.raises(RecipeError, match="neither under this id nor in the catalogue"):
        make_plan(request_of(derive(FINETUNED, {"init.recipe": "vit"})))
    with pytest.raises(RecipeError, match="in a circle"):
        make_plan(request_of(derive(FINETUNED, {"init.recipe": "finetuned"})))
