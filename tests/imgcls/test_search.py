"""What a search may change, and what its seed draws."""

import math
import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imgcls.catalogue import CATALOGUES, quick
from imgcls.errors import RecipeError
from imgcls.recipe import Adam, Recipe
from imgcls.search import Choice, Range, Search, space_from, space_of

ALL = [recipe for suite in CATALOGUES.values() for recipe in suite]
SPACE = {"optimizer.lr": Range(kind="log-uniform", low=1e-4, high=1e-2), "global_batch_size": Choice(values=(32, 64))}


def search(num_trials: int, seed: int = 0, recipe: Recipe = quick.BASIC_CNN) -> Search:
    return Search(recipe=recipe, space=space_of(recipe), num_trials=num_trials, seed=seed)


@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 20))
def test_a_trial_is_the_same_however_many_follow(seed: int, few: int, more: int):
    assert search(few, seed).trials() == search(few + more, seed).trials()[:few]


def test_the_first_trial_is_the_recipe_itself_and_no_two_are_alike():
    first, *others = search(30).trials()
    assert (first.name, first.optimizer, first.augment) == (
        "basic-cnn-000",
        quick.BASIC_CNN.optimizer,
        quick.BASIC_CNN.augment,
    )
    assert len({one.optimizer for one in others}) == len({one.name for one in others}) == 29


@given(st.floats(0, 1, exclude_max=True))
def test_what_is_drawn_lies_within_its_domain_and_has_its_place_there(u: float):
    for domain in (
        Range(kind="uniform", low=0.25, high=1.0),
        Range(kind="log-uniform", low=1e-4, high=0.3),
        Range(kind="uniform", low=0.99, high=0.9999),
        Choice(values=(32, 64, None)),
    ):
        assert 0 <= domain.place(domain.at(u)) <= 1
    assert Choice(values=(32, 64)).at(u) == (32 if u < 0.5 else 64)


def test_a_narrow_range_has_as_many_values_as_a_wide_one():
    for domain in (Range(kind="uniform", low=0.9, high=0.901), Range(kind="log-uniform", low=99.9, high=100.1)):
        assert len({domain.at(i / 100) for i in range(100)}) > 90


@pytest.mark.parametrize("recipe", ALL, ids=lambda recipe: recipe.name)
def test_each_catalogued_recipe_has_a_space_whose_values_it_can_take(recipe: Recipe):
    assert len(search(20, recipe=recipe).trials()) == 20


def test_what_adam_has_not_is_not_searched():
    assert isinstance(CATALOGUES["paper"][0].optimizer, Adam)
    assert "optimizer.weight_decay" not in space_of(CATALOGUES["paper"][0])
    assert "optimizer.weight_decay" in space_of(quick.BASIC_CNN)


@pytest.mark.parametrize(
    "text",
    [
        """
"optimizer.lr" = {kind = "log-uniform", low = 1e-4, high = 1e-2}
global_batch_size = {kind = "choice", values = [32, 64]}
""",
        """
[optimizer.lr]
kind = "log-uniform"
low = 1e-4
high = 1e-2
[global_batch_size]
kind = "choice"
values = [32, 64]
""",
    ],
)
def test_a_space_is_read_from_toml_in_either_spelling(text: str):
    assert space_from(tomllib.loads(text), where="here") == SPACE
    trials = Search(recipe=quick.BASIC_CNN, space=SPACE, num_trials=9).trials()
    assert {trial.global_batch_size for trial in trials[1:]} == {32, 64}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('lr = {kind = "uniform", low = 1.0}', "high"),
        ('lr = {kind = "uniform", low = 2.0, high = 1.0}', "low is below high"),
        ('lr = {kind = "uniform", low = 0.0, high = inf}', "finite number"),
        ('lr = {kind = "uniform", low = -1e308, high = 1e308}', "low is below high"),
        ('lr = {kind = "log-uniform", low = 1e-308, high = 1e308}', "low is below high"),
        ('lr = {kind = "normal"}', "normal"),
        ('lr = {kind = "log-uniform", low = 0.0, high = 1.0}', "above 0"),
        ('lr = {kind = "choice", values = []}', "at least 1"),
    ],
)
def test_a_wrong_space_is_named(text: str, said: str):
    with pytest.raises(RecipeError, match=said):
        space_from(tomllib.loads(text), where="--space here.toml")


@pytest.mark.parametrize("num_trials", [1, 2])
def test_a_field_that_the_recipe_has_not_is_named(num_trials: int):
    space = {"optimizer.momentum": SPACE["optimizer.lr"]}
    with pytest.raises(RecipeError, match=r"unknown field optimizer\.momentum"):
        Search(recipe=quick.BASIC_CNN, space=space, num_trials=num_trials).trials()


@pytest.mark.parametrize("path", ["name", "dataset", "length.epochs", "validation.fraction", "train_fraction"])
def test_what_all_trials_share_cannot_be_searched(path: str):
    with pytest.raises(RecipeError, match="compared on the same samples"):
        space_from({path: {"kind": "choice", "values": [1]}}, where="here")
    with pytest.raises(RecipeError, match="names no field"):
        space_from({}, where="here")


def test_a_value_that_lies_nowhere_in_its_domain_has_no_place():
    domains = (Range(kind="log-uniform", low=1e-4, high=0.3), Choice(values=(1,)))
    assert all(math.isnan(domain.place(value)) for domain in domains for value in (0.0, None))
