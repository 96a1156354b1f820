from pathlib import Path

import pytest

from imgcls.catalogue import quick
from imgcls.rates import keep, known, new, rates_of
from imgcls.records import Placement
from tests.imgcls.results.test_results import result


def test_a_trial_of_a_search_that_is_not_tested_shows_rates_too():
    placement = Placement(num_workers=1, cpus_per_worker=1, gpus_per_worker=0)
    seconds = {"train": 10.0, "validate": 2.0, "cache": 0.0}
    trial = result(quick.SCRATCH, 0.5).model_copy(update={"test": None, "placement": placement, "seconds": seconds})
    assert [(rate.what, rate.value) for rate in rates_of(trial)] == [("train", 100.0), ("evaluate", 1000.0)]


@pytest.mark.parametrize("order", [("guess", "run"), ("run", "guess")])
def test_a_guess_takes_the_place_of_nothing_that_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, order):
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path / "cache"))
    values = {"guess": 50.0, "run": 40.0}
    for source in order:
        keep([new("overhead", "1 workers", "a machine", values[source], source)])
    rate = known(measurements=tmp_path).find("overhead", "1 workers", "a machine")
    assert rate is not None
    assert (rate.value, rate.source) == (40.0, "run")


def test_a_guess_is_known_as_one_until_something_was_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path / "cache"))
    keep([new("session", "", "a machine", 9.0, "guess")])
    rate = known(measurements=tmp_path).find("session", "", "a machine")
    assert rate is not None
    assert rate.source == "guess"
