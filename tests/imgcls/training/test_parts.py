"""The small parts of training: schedule, totals, ledger."""

import platform
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from imgcls.data.order import global_batches, rank_part
from imgcls.recipe import Constant, OneCycle, Recipe
from imgcls.training import gradients
from imgcls.training.files import TrafficMeter
from imgcls.training.ledger import Entry, Ledger, planned
from imgcls.training.module import OPTIMIZERS
from imgcls.training.schedule import lr_factor
from imgcls.training.totals import Totals
from tests.conftest import ROOT


def test_training_knows_every_optimizer_and_schedule_that_a_recipe_can_name():
    def kinds(field: str) -> set[Any]:
        return {fields(kind)[0].default for kind in get_args(get_type_hints(Recipe)[field])}

    assert kinds("optimizer") == OPTIMIZERS.keys()
    assert kinds("schedule") == {"constant", "one-cycle"}  # the branches of `lr_factor`


def test_a_constant_schedule_is_constant():
    assert {lr_factor(Constant(), step=s, total_steps=9) for s in range(9)} == {1.0}


@given(total=st.integers(1, 500), warmup=st.floats(0.01, 1))
def test_one_cycle_rises_to_the_full_rate_and_falls_towards_zero(total: int, warmup: float):
    factors = [lr_factor(OneCycle(warmup=warmup), step=s, total_steps=total) for s in range(total)]
    top = factors.index(max(factors))
    assert all(0 < f <= 1 for f in factors)
    assert max(factors) == pytest.approx(1, abs=1e-9)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert lr_factor(OneCycle(), step=total, total_steps=total) == 0


@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_totals_do_not_depend_on_how_a_split_is_cut(cuts: list[int], seed: int):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(sum(cuts), 4, generator=generator) * 10
    labels = torch.randint(0, 4, (sum(cuts),), generator=generator)
    whole, parts = Totals(4), Totals(4)
    whole.update(logits, labels)
    for some, theirs in reversed(list(zip(logits.split(cuts), labels.split(cuts), strict=True))):
        parts.update(some, theirs)
    assert whole.compute() == parts.compute()


def test_totals_are_torchs_loss_and_sklearns_confusion():
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]]), torch.tensor([0, 1, 1])
    totals = Totals(2)
    totals.update(logits, labels)
    scores = totals.compute()
    assert scores.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), abs=1e-7)
    assert scores.confusion == ((1, 0), (1, 1))
    assert (scores.accuracy, scores.num_samples) == (pytest.approx(2 / 3), 3)


def test_the_largest_losses_of_a_large_split_fit_into_their_sum():
    totals = Totals(2)
    for _ in range(50):
        totals.update(torch.tensor([[1e30, 0.0]]).expand(100_000, 2), torch.ones(100_000, dtype=torch.int64))
    assert totals.compute().loss == 1e4


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ledger_of_all_ranks_is_the_planned_one(world_size: int):
    batches = global_batches(np.arange(103), seed=1, epoch=2, size=8, keep_last=True)
    seen = Ledger()
    for rank in reversed(range(world_size)):  # the order of ranks does not matter
        for step, batch in enumerate(batches):
            seen.update(rank_part(batch, rank=rank, world_size=world_size), step)
    assert seen.compute() == planned(batches)
    assert planned(batches).samples == 103


def test_the_ledger_notices_a_sample_lost_doubled_or_at_another_step():
    batches = [np.array([1, 2, 3]), np.array([4, 5, 6])]

    def of(*steps: list[int]) -> Entry:
        ledger = Ledger()
        for step, ids in enumerate(steps):
            ledger.update(np.array(ids), step)
        return ledger.compute()

    assert of([3, 1, 2], [6, 5, 4]) == planned(batches)
    for wrong in (([1, 2], [4, 5, 6]), ([1, 2, 2], [4, 5, 6]), ([1, 2, 4], [3, 5, 6]), ([1, 2, 3], [4, 5, 7])):
        assert of(*wrong) != planned(batches)


def test_a_sum_of_gradients_that_did_not_arrive_is_an_error_and_no_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        bucket = SimpleNamespace(buffer=lambda: torch.arange(5.0))
        assert torch.equal(gradients._add_in_rank_order(None, bucket).wait(), torch.arange(5.0))  # pyright: ignore
        lost = torch.futures.Future()
        lost.set_exception(RuntimeError("gloo: a rank has gone"))
        monkeypatch.setattr(dist, "all_gather", lambda *_, **__: SimpleNamespace(get_future=lambda: lost))
        with pytest.raises(RuntimeError, match="a rank has gone"):
            gradients._add_in_rank_order(None, bucket).wait()  # pyright: ignore
    finally:
        dist.destroy_process_group()


def test_slow_storage_of_earlier_attempts_is_no_complaint_of_this_one():
    meter = TrafficMeter()
    meter.go_on({"requests": 9.0, "retries": 9.0}, checkpoint_s=40.0)
    assert meter.complaint(epoch_s=3, checkpoint_s=40.1) == ""
    assert "storage is slow" in meter.complaint(epoch_s=3, checkpoint_s=80.0)


def test_hardware_without_a_gpu_is_named_without_torch_and_as_torch_names_it():
    """Importing torch takes seconds that a command would wait for."""
    code = (
        "import sys; from imgcls.training.environment import hardware; print(hardware()['vectors'], 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    x86 = platform.machine() == "x86_64" and platform.system() == "Linux"
    imported = torch.cuda.is_available() or not x86
    assert done.stdout.split() == [torch.backends.cpu.get_cpu_capability(), str(imported)]


def test_a_model_is_found_and_asked_without_lightning():
    """Importing it takes seconds that who asks for a prediction would wait for."""
    code = (
        "import sys, imgcls.training.predict, imgcls.training.weights as w; print('lightning' in sys.modules, w.find_model)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False")
