import json
import pickle
from dataclasses import replace

import pytest

from imgcls import catalogue
from imgcls.catalogue import paper, quick, transfer
from imgcls.errors import ImgclsError, RecipeError
from imgcls.recipe import (
    Augment,
    FromRun,
    Recipe,
    Scratch,
    changes_between,
    derive,
    differing_fields,
    parse_changes,
    recipe_from_json,
)
from imgcls.records import RunConfig

ALL = [(name, recipe) for name, suite in catalogue.CATALOGUES.items() for recipe in suite]


@pytest.mark.parametrize(("name", "recipe"), ALL, ids=[f"{name}-{recipe.name}" for name, recipe in ALL])
def test_every_catalogued_recipe_survives_json_and_pickle(name: str, recipe):
    again = recipe_from_json(recipe.to_json(), where="here")
    assert again == recipe
    assert json.dumps(again.to_json()) == json.dumps(recipe.to_json()), "a run of it would have another digest"
    assert pickle.loads(pickle.dumps(recipe)) == recipe


@pytest.mark.parametrize("name", ["quick", "paper", "tuned"])
def test_each_catalogue_has_the_five_and_the_pair_differs_in_its_start_alone(name: str):
    suite = {recipe.name: recipe for recipe in catalogue.suite_of(name)}
    assert list(suite) == ["basic-cnn", "resnet18", "regularized", "scratch", "finetuned"]
    assert replace(suite["finetuned"], name="scratch", init=Scratch()) == suite["scratch"]
    assert suite["finetuned"].init == FromRun(recipe="resnet18")


def test_the_arms_of_transfer_differ_in_their_start_alone_at_each_number_of_labels():
    source, *arms = transfer.SUITE
    assert source == quick.RESNET18
    for scratch, finetuned in zip(arms[::2], arms[1::2], strict=True):
        assert finetuned.name == scratch.name.replace("scratch", "finetuned")
        assert replace(finetuned, name=scratch.name, init=Scratch()) == scratch
    assert [scratch.train_fraction for scratch in arms[::2]] == [0.01, 0.1, 1.0]


def test_paper_holds_the_published_settings():
    basic, resnet, regularized, scratch, _ = paper.SUITE
    assert (basic.optimizer.lr, basic.global_batch_size, basic.length.epochs, basic.length.patience) == (1e-3, 128, 30, 5)
    assert (basic.input.px, basic.input.channels, basic.model.dropout) == (64, 1, 0.3)
    assert (resnet.length.epochs, resnet.length.patience, resnet.augment) == (30, 5, Augment())
    assert (regularized.model.dropout, regularized.global_batch_size, regularized.validation.fraction) == (0.5, 64, 0.2)
    assert (regularized.input.px, regularized.augment.rotate_degrees, regularized.augment.hue) == (64, 10, 0.1)
    assert (scratch.input.px, scratch.optimizer.lr, scratch.length.epochs, scratch.length.patience) == (224, 1e-4, 20, 7)
    assert scratch.validation.fraction == 0.1


def config(recipe: Recipe) -> RunConfig:
    return RunConfig(catalogue="quick", recipe=recipe, seed=0, data_digest="d", init=None, synthetic=False)


def test_the_digest_changes_with_any_field_and_with_nothing_else():
    assert config(quick.SCRATCH).digest() == config(replace(quick.SCRATCH)).digest()
    changed = derive(quick.SCRATCH, {"optimizer.lr": 0.01})
    assert config(changed).digest() != config(quick.SCRATCH).digest()
    assert differing_fields(quick.SCRATCH.to_json(), changed.to_json()) == ["optimizer.lr: 0.002 / 0.01"]


def test_runs_that_are_on_record_keep_their_digest_when_recipes_get_a_new_field():
    before = "ff4b65c6ba765ed3276e39d91fc7cc35e3c878b033065ac8830672058f4cc648"
    assert config(quick.BASIC_CNN).digest() == before
    assert config(derive(quick.BASIC_CNN, {"averaging": 0.9})).digest() != before


def test_a_recipe_has_one_digest_from_python_and_from_json():
    for _, recipe in ALL:
        assert RunConfig.model_validate_json(config(recipe).to_bytes()).digest() == config(recipe).digest()


def test_changes_are_made_by_path():
    changes = parse_changes(
        ("optimizer.lr=0.01", "dataset=pets", "length.epochs=3", "augment.flip=true", "length.patience=2")
    )
    changed = derive(quick.SCRATCH, changes)
    assert (changed.optimizer.lr, changed.dataset, changed.length.epochs) == (0.01, "pets", 3)
    assert changed.augment.flip is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optimizer.learning_rate=1", r"unknown field optimizer\.learning_rate; known here: kind, lr"),
        ("colour=1", r"unknown field colour; known here: name, dataset"),
        ("dataset.name=x", r"unknown field dataset.name; known here: name, dataset"),
        ("length.epochs=0", r"length\.epochs: .*greater than or equal to 1"),
        ("length.epochs=1.5", r"length\.epochs"),
        ("optimizer.lr=fast", r"optimizer\.lr"),
        ("optimizer.kind=sgd", r"optimizer.*'adam', 'adamw'"),
        ("model.dropout=1.0", r"model\.dropout"),
    ],
)
def test_a_wrong_change_is_answered_with_what_there_is(change: str, message: str):
    with pytest.raises(RecipeError, match=message):
        derive(quick.SCRATCH, parse_changes((change,)))


@pytest.mark.parametrize(("a", "b"), [(quick.SCRATCH, paper.SCRATCH), (quick.FINETUNED, quick.SCRATCH)])
def test_the_changes_between_two_recipes_make_one_of_the_other(a, b):
    assert derive(a, changes_between(a, b)) == b
    assert changes_between(a, a) == {}


def test_a_change_without_a_value_is_refused():
    with pytest.raises(RecipeError, match="write --set FIELD=VALUE"):
        parse_changes(("optimizer.lr",))


def test_an_unknown_field_of_a_file_is_answered_with_those_that_exist():
    value = quick.SCRATCH.to_json()
    value["optimizer"]["momentum"] = 0.9
    with pytest.raises(RecipeError, match=r"unknown field optimizer\.momentum; known here: kind, lr, weight_decay"):
        recipe_from_json(value, where="mine.toml")


def test_unknown_names_are_answered_with_the_known():
    with pytest.raises(RecipeError, match="basic-cnn, resnet18"):
        catalogue.recipe_of("quick", "resnet50")
    with pytest.raises(RecipeError, match="quick, paper, tuned"):
        catalogue.suite_of("fast")


@pytest.mark.parametrize("kind", [ImgclsError, *ImgclsError.__subclasses__()])
def test_errors_survive_pickling(kind: type[ImgclsError]):
    again = pickle.loads(pickle.dumps(kind("what\n  do: this")))
    assert type(again) is kind
    assert str(again) == "what\n  do: this"
