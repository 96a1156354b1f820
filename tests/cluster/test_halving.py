"""Which trials of a search are stopped, and that a later command knows what earlier ones have seen."""

from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import TrialScheduler

from cluster.carry.halving import Halving
from imgcls.catalogue import quick
from imgcls.recipe import derive
from imgcls.search import Search

GO_ON, STOP = TrialScheduler.CONTINUE, TrialScheduler.STOP
RECIPE = derive(quick.BASIC_CNN, {"length.epochs": 9})


def halving(earlier: dict[str, list[dict[str, float]]] | None = None, metric: Any = "val/accuracy"):
    """earlier: the histories that earlier commands have left."""
    said, histories = dict[str, str](), {} if earlier is None else earlier
    search = Search(recipe=RECIPE, space={}, num_trials=9, metric=metric)
    made = Halving(search, [*histories], history_of=lambda run: histories.get(run, []), stop=said.__setitem__)
    return made, said


def told(scheduler: Halving, run: str, epoch: int, value: float, metric: str = "val/accuracy") -> str:
    """Tune passes a run's row on, flattened."""
    trial = SimpleNamespace(config={"run": run}, trial_id="whatever")
    return scheduler.on_trial_result(None, trial, {"phase": "train", "row/epoch": epoch, f"row/{metric}": value})


def test_a_trial_that_is_not_in_the_best_third_at_a_rung_is_stopped_and_the_reason_is_on_record():
    scheduler, said = halving()
    assert [told(scheduler, f"a{i}", 1, value) for i, value in enumerate((0.5, 0.6, 0.7))] == [GO_ON] * 3
    assert told(scheduler, "b", 1, 0.4) == STOP
    assert said == {"b": "after epoch 1 of 9: val/accuracy 0.4000 is not in the best 33% of those that have come so far"}
    assert told(scheduler, "c", 1, 0.8) == GO_ON


def test_of_losses_the_high_ones_are_stopped():
    scheduler, said = halving(metric="val/loss")
    assert [told(scheduler, f"a{i}", 1, value, "val/loss") for i, value in enumerate((0.7, 0.6, 0.5))] == [GO_ON] * 3
    assert told(scheduler, "b", 1, 0.9, "val/loss") == STOP
    assert list(said) == ["b"]


def test_what_is_no_epochs_end_stops_nobody():
    scheduler, _ = halving({f"a{i}": [{"epoch": 1.0, "val/accuracy": 0.9}] for i in range(5)})
    trial = SimpleNamespace(config={"run": "b"}, trial_id="b")
    assert scheduler.on_trial_result(None, trial, {"phase": "train"}) == GO_ON


def test_trials_of_an_earlier_command_are_compared_with():
    earlier = {f"a{i}": [{"epoch": 1.0, "val/accuracy": 0.5 + i / 10}] for i in range(3)}
    assert told(halving(earlier)[0], "b", 1, 0.4) == STOP
    assert told(halving()[0], "b", 1, 0.4) == GO_ON


def test_a_trial_that_goes_on_is_not_compared_with_itself_again():
    """Its epochs of before count where they were, not at the epoch from which it goes on."""
    rows = [{"epoch": float(epoch), "val/accuracy": value} for epoch, value in ((1, 0.3), (2, 0.6))]
    others = {f"a{i}": [{"epoch": 1.0, "val/accuracy": 0.5}] for i in range(4)}
    scheduler, _ = halving({**others, "b": rows})
    assert told(scheduler, "b", 2, 0.1) == GO_ON
    assert told(scheduler, "b", 3, 0.1) == GO_ON, "the first at this rung"


def test_a_trial_whose_stop_was_not_put_on_record_is_stopped_at_its_first_word():
    """The command was killed in between."""
    earlier = {f"a{i}": [{"epoch": 1.0, "val/accuracy": 0.5 + i / 10}] for i in range(3)}
    scheduler, said = halving({**earlier, "b": [{"epoch": 1.0, "val/accuracy": 0.4}]})
    trial = SimpleNamespace(config={"run": "b"}, trial_id="b")
    assert scheduler.on_trial_result(None, trial, {"phase": "workers import"}) == STOP
    assert list(said) == ["b"]


def test_an_epoch_that_was_not_reported_is_judged_by_the_history_and_not_by_a_later_one():
    """Its worker died between the two."""
    histories: dict[str, list[dict[str, float]]] = {}
    scheduler, said = halving(histories)
    histories["b"] = [{"epoch": 1.0, "val/accuracy": 0.1}]
    assert told(scheduler, "b", 2, 0.9) == GO_ON
    assert told(scheduler, "c", 1, 0.2) == GO_ON, "better than 0.1 was at the same epoch"
    assert not said


def test_at_the_last_epoch_nobody_is_stopped():
    scheduler, said = halving({f"a{i}": [{"epoch": 9.0, "val/accuracy": 0.9}] for i in range(5)})
    assert told(scheduler, "b", 9, 0.1) == GO_ON
    assert not said
