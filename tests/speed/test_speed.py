"""`bench speed data` at a tiny size: its record, its table, and that each loader gives every image once an epoch."""

from pathlib import Path

import numpy as np
import pytest

from imgcls.catalogue import paper
from imgcls.data.shards import pack
from imgcls.data.sources import open_source
from imgcls.errors import DataError
from imgcls.training import environment
from tests.conftest import Command, image_folder
from tests.proof.records import HEADLINES, Kind, SpeedRecord, Timed, table_of
from tests.speed import bench, data, prepared
from tests.speed.peers import ALWAYS, OPTIONAL, Contender

COUNT = 150
"""Images of a class; of two classes, a fifth is cut for the test part: 240 train."""


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed sets of noise, not of the kind that is marked synthetic: a record is not of synthetic ones."""
    folder = tmp_path_factory.mktemp("noise")
    image_folder(folder / "images", count=COUNT)
    for name in ("imagenette", "cifar10"):
        pack(open_source(folder / "images"), str(folder / "packed" / name), name=name)
    return folder / "packed"


@pytest.mark.slow
def test_the_command_measures_loaders_and_leaves_a_record_and_tables(
    noise: Path, enter_command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = data.measure_data
    monkeypatch.setattr(data, "measure_data", lambda *given: whole(*given, most=140, optional=False))
    monkeypatch.setattr(data, "SETS", data.SETS[:1])
    monkeypatch.setattr(data, "LEAST_S", 0.0)
    monkeypatch.setattr(environment, "commit", lambda: "0123456789ab")
    done = enter_command("bench", "speed", "data", "--repeats", "1", "--data", noise)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "docs" / "measurements"
    (file,) = folder.iterdir()
    groups = SpeedRecord.from_bytes(file.read_bytes(), where=str(file)).groups()
    assert [name.rpartition(", ")[2] for name in groups] == [data.FIRST, data.LATER]
    later = groups["Imagenette 64 px gray, later epochs"]
    names = ["torchvision ImageFolder", "webdataset", "memory copy and conversion", "imgcls, two threads", "imgcls"]
    assert [(one.name, one.n, min(one.values) > 0) for one in later] == [(name, 1, True) for name in names]
    assert "| Imagenette 64 px gray, first epoch | torchvision ImageFolder |" in table_of("speed-data", folder)
    assert "| step, resnet18 | unmeasured |" in table_of("speed", folder)


def pixels_of(one: Contender, given: prepared.Prepared) -> list[bytes]:
    """The images of the second epoch, in an order of their own."""
    epoch = one.open(given)
    for _ in epoch(0):
        pass
    images = [image for batch in epoch(1) for image in (batch * 0.25 + 0.5).mul(255).round().byte().numpy()]
    return sorted(np.ascontiguousarray(image).tobytes() for image in images)


def assert_every_image_comes_once(given: prepared.Prepared, contenders: tuple[Contender, ...]) -> None:
    ours = pixels_of(data.OURS[-1], given)
    assert len(set(ours)) == len(ours) == prepared.num_prepared(given) == 140
    for one in contenders:
        theirs = pixels_of(one, given)
        if "arrays" in one.name or one.kind != "peer":
            assert theirs == ours, one.name
        else:  # cut after it was resized, not before: pixels differ, images do not
            assert len(set(theirs)) == len(theirs) == len(ours), one.name
            assert theirs == pixels_of(ALWAYS[0], given), one.name


@pytest.mark.slow
def test_every_loader_gives_every_image_once(noise: Path, tmp_path: Path):
    given = prepared.prepare(paper.BASIC_CNN, str(noise), tmp_path, num_train=140, num_test=20)
    assert_every_image_comes_once(given, (*ALWAYS, *data.OURS))


@pytest.mark.slow
def test_every_optional_loader_gives_every_image_once(noise: Path, tmp_path: Path):
    try:
        prepared.check_peers()
    except DataError as missing:
        pytest.skip(str(missing))
    given = prepared.prepare(paper.BASIC_CNN, str(noise), tmp_path, num_train=140, num_test=20)
    prepared.prepare_peers(given)
    assert_every_image_comes_once(given, OPTIONAL)


def test_what_is_not_installed_is_said_before_anything_is_measured(noise: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prepared, "PLACE", Path("/no/such/folder"))
    monkeypatch.setattr(prepared, "PEERS", ("litdata", "no_such_package"))
    with pytest.raises(DataError, match=r"no_such_package.*\n.*pip install --no-deps --target .peers"):
        bench.measure_speed("data", str(noise), 1, pytest.fail)


def test_ours_is_compared_by_turn_with_the_best_of_the_others(tmp_path: Path):
    def timed(name: str, kind: Kind, *values: float) -> Timed:
        return Timed(group=HEADLINES["start"], name=name, kind=kind, unit="s", values=values, median=sorted(values)[1], n=3)

    record = SpeedRecord(
        subject="speed-start", claim="", command="c", date="2026-01-01", seconds=1.0, commit="c", versions={"torch": "2"},
        hardware={"cpus": "2", "vectors": "X"},
        timed=(timed("a", "peer", 9, 9, 9), timed("b", "by hand", 1, 2, 8), timed("imgcls", "ours", 2, 3, 24)),
    )  # fmt: skip
    (tmp_path / record.file_name).write_bytes(record.to_bytes())
    assert f"| {HEADLINES['start']} | 2.0 s, b | 3.0 s | 0.50 | 3 |" in table_of("speed", tmp_path)
    assert f"| {HEADLINES['start']} | a | 9.0 s | 9.0 to 9.0 | 3.00 | 3 |" in table_of("speed-start", tmp_path)
