from pathlib import Path

import pytest

from cluster.carry.decide import Status, SuiteState
from cluster.foretell.forecast import hardware_of, schedule
from cluster.foretell.prices import read_prices
from cluster.placement import Node
from imgcls.errors import RecipeError
from imgcls.rates import Rates, keep, known, new
from imgcls.records import Placement

RUNS = {"source": None, "other": None, "dependent": "source"}
STATE = SuiteState(dict.fromkeys(RUNS, Status.OPEN), RUNS)
PRICES = """
currency: USD
as_of: 2026-11-01
source: by hand
node_types:
  head: {per_hour: "0.20", market: on-demand, instance: m6i.xlarge, gpus: 0}
  spot: {per_hour: "0.45", market: spot, instance: g5.xlarge, gpus: 1}
"""


@pytest.mark.parametrize(("room", "ends"), [(1, (10, 13, 18)), (2, (10, 3, 15)), (5, (10, 3, 15))])
def test_runs_are_scheduled_as_decide_starts_them(room: int, ends: tuple[int, int, int]):
    spans = schedule(STATE, {"source": 10, "other": 3, "dependent": 5}, room)
    assert spans is not None
    assert tuple(spans[run].end for run in RUNS) == ends
    assert spans["dependent"].start >= spans["source"].end


def test_a_run_of_unknown_length_makes_the_whole_unknown():
    assert schedule(STATE, {"source": 10, "other": None, "dependent": 5}, 2) is None


def test_rates_are_kept_the_newest_of_a_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("IMGCLS_CACHE", str(tmp_path / "cache"))
    for value in (10.0, 20.0):
        keep([new("train", "work", "a machine", value, "run")])
    found = known(measurements=tmp_path)
    assert found.get("train", "work", "a machine") == 20.0
    assert found.get("train", "work", "another") is None
    (tmp_path / "cache" / "rates.json").write_text("damaged")
    assert known(measurements=tmp_path) == Rates()


@pytest.mark.parametrize(("gpu", "hardware"), [("L4", "NVIDIA L4"), ("V100", "Tesla V100-SXM2-16GB"), ("A10", "A10")])
def test_the_rates_of_a_gpu_are_not_those_of_one_whose_name_begins_alike(gpu: str, hardware: str):
    shown = [new("train", "x", name, 900.0, "run") for name in ("NVIDIA L40S", "NVIDIA L4", "Tesla V100-SXM2-16GB", "A100")]
    placement = Placement(num_workers=1, cpus_per_worker=1, gpus_per_worker=1)
    assert hardware_of([Node(8, 1, "a", gpu=gpu)] * 2, placement, Rates(rates=tuple(shown))) == hardware


def test_a_price_table_is_read_and_every_type_of_the_cluster_has_to_be_in_it(tmp_path: Path):
    path = tmp_path / "prices.yaml"
    path.write_text(PRICES)
    assert read_prices(path, {"head", "spot"}).node_types["spot"].gpus == 1
    with pytest.raises(RecipeError, match="no price for big"):
        read_prices(path, {"head", "big"})
    wrongs = (
        (PRICES.replace('per_hour: "0.45", ', ""), r"spot.per_hour: Field required"),
        (PRICES.replace("0.45", "-0.45"), r"spot.per_hour: Input should be greater than or equal to 0"),
        (PRICES + "boot_s: .nan", "boot_s"),
        ("{", "--prices"),
    )
    for wrong, says in wrongs:
        path.write_text(wrong)
        with pytest.raises(RecipeError, match=says):
            read_prices(path)
