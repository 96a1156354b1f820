"""A model as a file for others: it answers as the checkpoint does, where this project is not."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags

from imgcls.data import shards
from imgcls.data.sources import open_source
from imgcls.errors import CheckpointError, DataError, RecipeError
from imgcls.recipe import ResNet18, derive
from imgcls.training import export as exporting
from imgcls.training.export import export
from imgcls.training.predict import Predictor
from imgcls.training.weights import find_model
from tests.conftest import ROOT, Command, image, image_folder
from tests.imgcls.training.test_fit import SMALL, run

ELSEWHERE = """
import json, sys
import numpy as np
for name in ("imgcls", "lightning", "torchvision", "webdataset"):
    sys.modules[name] = None  # an import fails
images = np.load("images.npy")
if sys.argv[1].endswith(".onnx"):
    sys.modules["torch"] = None
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1])
    facts = json.loads(session.get_modelmeta().custom_metadata_map["imgcls.json"])
    logits = session.run(None, {"images": images})[0]
else:
    import torch
    extra = {"imgcls.json": ""}
    program = torch.export.load(sys.argv[1], extra_files=extra)
    facts = json.loads(extra["imgcls.json"])
    logits = program.module()(torch.from_numpy(images)).detach().numpy()
np.save("logits.npy", logits)
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def trained(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ResNet-18 that enlarges what the cache keeps."""
    folder = tmp_path_factory.mktemp("exported") / "small-seed0"
    recipe = derive(SMALL, {"length.epochs": 1, "input.px": 24, "model": {"kind": "resnet18", "dropout": 0.2}})
    assert isinstance(recipe.model, ResNet18)
    run(recipe, packed, folder)
    return folder


@pytest.fixture(scope="module")
def as_onnx(trained: Path, packed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    to = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export(find_model(str(trained)), to=str(to), data_url=str(packed))
    return to


@pytest.mark.slow
def test_the_example_in_the_guide_answers_as_predict_does(trained: Path, as_onnx: Path):
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/commands.md").read_text(), re.DOTALL | re.MULTILINE)
    photo = image(3, size=(60, 41))
    photo.getexif()[ExifTags.Base.Orientation] = 6
    photo.save(as_onnx.with_name("photo.jpg"), exif=photo.getexif())
    done = subprocess.run([sys.executable, "-c", example], cwd=as_onnx.parent, check=True, capture_output=True, text=True)
    predictor = Predictor(find_model(str(trained)))
    (top,) = predictor.top([predictor.pixels(as_onnx.with_name("photo.jpg").read_bytes())], 1)
    assert done.stdout.strip() == top[0][0]


@pytest.mark.parametrize("ending", [pytest.param("pt2", marks=pytest.mark.slow), "onnx"])
def test_an_exported_model_answers_alike_where_this_project_is_not(
    trained: Path, packed: Path, tmp_path: Path, ending: str, enter_command: Command
):
    done = enter_command("export", trained, "--to", tmp_path / f"model.{ending}", "--data", packed)
    assert done.returncode == 0, done.stderr
    assert "SYNTHETIC on 60 test images a logit differs" in done.stdout
    predictor = Predictor(find_model(str(trained)))
    images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    words = [sys.executable, "-I", "-c", ELSEWHERE, f"model.{ending}"]
    facts = json.loads(subprocess.run(words, cwd=tmp_path, check=True, capture_output=True, text=True).stdout)
    logits = np.load(tmp_path / "logits.npy").astype(float)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    for row, top in zip(probabilities, predictor.top(list(images), 10), strict=True):
        assert dict(zip(facts["class_names"], row, strict=True)) == pytest.approx(dict(top), abs=1e-4)
    assert facts["preprocessing"]["stored_px"] == 16
    assert facts["weights_sha256"] == predictor.model.weights_sha256
    assert facts["synthetic"] is True


@pytest.mark.parametrize(("error", "said"), [(2e-4, "0.0002"), (math.nan, "nan")])
def test_nothing_is_written_where_the_answers_differ(
    trained: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float, said: str
):
    write, to = exporting._write_pt2, tmp_path / "model.pt2"

    def other(*arguments):
        answer = write(*arguments)
        return lambda images: answer(images) + np.where(np.arange(len(images)) == 9, error, 0.0)[:, None]

    monkeypatch.setattr(exporting, "_write_pt2", other)
    monkeypatch.setattr(exporting, "AT_ONCE", 25)
    with pytest.raises(CheckpointError, match=f"a logit differs by {said}"):
        export(find_model(str(trained)), to=str(to), data_url=str(packed))
    assert not to.exists()


def test_another_ending_or_other_classes_are_refused(trained: Path, packed: Path, tmp_path: Path):
    source = find_model(str(trained))
    with pytest.raises(RecipeError, match=r"ends in \.onnx or \.pt2"):
        export(source, to=str(tmp_path / "model.pb"), data_url=str(packed))
    shards.pack(open_source(image_folder(tmp_path / "pets")), str(tmp_path / "packed" / "cifar10"), name="cifar10")
    with pytest.raises(DataError, match=r"knows 10 classes"):
        export(source, to=str(tmp_path / "model.pt2"), data_url=str(tmp_path / "packed"))
