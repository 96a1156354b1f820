import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from imgcls.catalogue import quick
from imgcls.errors import RecipeError
from imgcls.recipe import derive
from imgcls.records import RunConfig
from imgcls.runs import SuiteFolder
from jobs._packing import _not_packed
from jobs._request import Flags, chosen
from tests.conftest import ROOT


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


@pytest.mark.parametrize(
    "name", ["a::b", "s3://b", "a?versionId=1", "a*", "[a]", "a\nb", "a\x1b[2J", "caf\udce9", "..", "a%2Fb", "a\\b"]
)
def test_a_name_that_a_url_or_a_terminal_would_read_otherwise_is_refused(name: str):
    with pytest.raises(RecipeError, match="a plain name, without"):
        id_of(id=name)


@pytest.mark.parametrize("name", ["mine", "my run 2", "größe", "gro\u0308ße", "実験", "a+b=c@d,(e)", "2026-11-25_x.y"])
def test_a_name_of_letters_of_any_script_is_taken(name: str):
    assert id_of(id=name) == name


def test_changes_are_made_in_every_recipe():
    assert chosen(Flags(set=("length.epochs=9",)), ("scratch",))[1] == (derive(quick.SCRATCH, {"length.epochs": 9}),)


def test_a_runs_config_brings_its_recipe_again(tmp_path: Path):
    config = RunConfig(catalogue="quick", recipe=quick.FINETUNED, seed=3, data_digest="d", init=None, synthetic=False)
    (tmp_path / "config.json").write_bytes(config.to_bytes())
    for place in (str(tmp_path / "config.json"), (tmp_path / "config.json").as_uri()):
        assert chosen(Flags(recipe=(place,)), None)[1] == (quick.FINETUNED,)
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3}))
    with pytest.raises(RecipeError, match=r"config\.json cannot be read"):
        chosen(Flags(recipe=(str(tmp_path / "config.json"),)), None)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_no_generator_takes_is_refused(seed: int):
    with pytest.raises(RecipeError, match=f"--seed {seed}: "):
        chosen(Flags(seed=seed), None)
    with pytest.raises(RecipeError, match=r"validation\.seed: "):
        chosen(Flags(set=(f"validation.seed={seed}",)), None)


def test_what_has_to_be_packed_are_the_sets_of_the_sources_too(tmp_path: Path):
    flags = Flags(data=str(tmp_path), storage=str(tmp_path / "runs"), id="mine")
    assert _not_packed(flags, (quick.FINETUNED,)) == ["cifar10", "imagenette"]
    mine = derive(quick.RESNET18, {"dataset": "mine"})
    assert _not_packed(flags, (mine, quick.FINETUNED)) == ["mine", "cifar10"]
    assert _not_packed(replace(flags, init_from="model.pt"), (quick.FINETUNED,)) == ["cifar10"]
    second = derive(quick.FINETUNED, {"name": "second", "init.recipe": "finetuned", "dataset": "mine"})
    assert _not_packed(flags, (second,)) == ["mine", "cifar10", "imagenette"]
    config = RunConfig(catalogue="quick", recipe=mine, seed=0, data_digest="d", init=None, synthetic=False)
    assert SuiteFolder(str(tmp_path / "runs" / "mine")).run("resnet18-seed0").create_config(config)
    assert _not_packed(flags, (quick.FINETUNED,)) == ["cifar10", "mine"]


def test_a_recipe_is_utf_8_in_any_locale(tmp_path: Path):
    (tmp_path / "mine.toml").write_text('name = "größe"\n', encoding="utf-8")
    code = "import sys; from jobs._request import _from_file; _from_file(sys.argv[1])"
    command = [sys.executable, "-X", "utf8=0", "-c", code, str(tmp_path / "mine.toml")]
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert "cannot be read as TOML" not in done.stderr
