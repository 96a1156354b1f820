from pathlib import Path

import pytest

from imgcls.rates import keep, known, new


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
