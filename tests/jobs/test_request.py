import json
from pathlib import Path

import pytest

from imgcls.catalogue import quick
from imgcls.errors import RecipeError
from imgcls.recipe import derive
from imgcls.records import RunConfig
from jobs._request import Flags, chosen


def id_of(*changes: str, **fields) -> str:
    return str(chosen(Flags(set=changes, **fields), None)[0].id)


def test_the_id_is_the_catalogue_or_carries_its_changes():
    assert (id_of(), id_of(catalogue="paper"), id_of(id="mine")) == ("quick", "paper", "mine")
    changed = id_of("length.epochs=1")
    assert changed.startswith("quick-")
    assert len(changed) == len("quick-") + 8
    assert changed == id_of("length.epochs=1") != id_of("length.epochs=2")
    assert id_of("precision=fp32") == "quick"
    flags, _ = chosen(Flags(set=("length.epochs=1",)), ("scratch",))
    assert flags.id == changed  # the run extends the suite with the same change


def test_changes_are_made_in_every_recipe():
    assert chosen(Flags(set=("length.epochs=9",)), ("scratch",))[1] == (derive(quick.SCRATCH, {"length.epochs": 9}),)


def test_a_runs_config_brings_its_recipe_again(tmp_path: Path):
    config = RunConfig(catalogue="quick", recipe=quick.FINETUNED, seed=3, data_digest="d", init=None, synthetic=False)
    (tmp_path / "config.json").write_bytes(config.to_bytes())
    assert chosen(Flags(recipe=(tmp_path / "config.json",)), None)[1] == (quick.FINETUNED,)
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3}))
    with pytest.raises(RecipeError, match=r"config\.json cannot be read"):
        chosen(Flags(recipe=(tmp_path / "config.json",)), None)
