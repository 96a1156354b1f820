"""The user's values fill infra/; what is missing is named, and nothing is written before it is shown."""

from pathlib import Path

import pytest
import yaml

from jobs.render import INFRA, PLACEHOLDER, templates
from tests.conftest import Command
from tests.infra.site import IMAGE

NAMES = sorted({name for text in templates().values() for name in PLACEHOLDER.findall(text)})
AWS = {name.partition(".")[2]: IMAGE if name.endswith("image") else "abc-1" for name in NAMES if name.startswith("aws.")}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return tmp_path / "site.yaml"


def test_a_section_fills_its_files_and_no_others(enter_command: Command, tmp_path: Path, site: Path):
    site.write_text(yaml.safe_dump({"aws": AWS, "gcp": {"project": ""}}))
    shown = enter_command("render", site)
    assert shown.returncode == 0
    assert f'image: "{IMAGE}"' in shown.stdout
    assert not (tmp_path / "filled").exists()
    assert enter_command("render", site, "--to", tmp_path / "filled").returncode == 0
    written = [path for path in (tmp_path / "filled").rglob("*") if path.is_file()]
    assert [str(path.relative_to(tmp_path / "filled")) for path in written] == ["ray/aws.yaml"]
    text = written[0].read_text()
    assert not PLACEHOLDER.search(text)
    assert yaml.safe_load(text)["provider"]["region"] == "abc-1"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"aws": AWS | {"ami": ""}}, "aws.ami is missing"),
        ({"aws": {}}, "aws.ami is missing"),
        ({"aws": {"region": "a"}}, "aws.subnet_a is missing"),
        ({"aws": AWS | {"amy": "ami-1"}}, "aws.amy is not a value of infra/site.yaml"),
        ({"aws": AWS | {"image": "registry.example/imgcls:latest"}}, "has no digest"),
        ({"aws": AWS | {"region": 'a"\nb: c'}}, "is not plain text"),
        ({"aws": AWS | {"region": "us # west"}}, "is not plain text"),
        ({"aws": AWS | {"region": "true"}}, "is not plain text"),
        ({"aws": AWS | {"region": "12"}}, "is not plain text"),
        ({"aws": AWS | {"region": "..."}}, "is not plain text"),
        ({"aws": AWS | {"region": "2001-99-99"}}, "is not plain text"),
        ({"aws": AWS | {"region": 12}}, "is not plain text"),
        ({"aws": ["region"]}, "no sections"),
        ({"aws": None}, "aws.ami is missing"),
        (None, "aws.ami is missing"),
        ("aws", "no sections"),
    ],
)
def test_what_is_missing_or_wrong_is_named_and_nothing_is_written(
    given: object, says: str, enter_command: Command, tmp_path: Path, site: Path
):
    site.write_text(yaml.safe_dump(given))
    done = enter_command("render", site, "--to", tmp_path / "filled")
    assert done.returncode == 2
    assert says in done.stderr
    assert "do: " in done.stderr
    assert not (tmp_path / "filled").exists()


@pytest.mark.parametrize(("folder", "code", "says"), [(INFRA / "new", 2, "name another"), ("/dev/null", 3, "/dev/null")])
def test_a_folder_that_cannot_be_written_or_holds_the_files_to_fill_is_refused(
    folder: Path, code: int, says: str, enter_command: Command, site: Path
):
    site.write_text(yaml.safe_dump({"aws": AWS}))
    done = enter_command("render", site, "--to", folder)
    assert (done.returncode, says in done.stderr) == (code, True)
    assert not (INFRA / "new").exists()


def test_all_that_is_missing_is_named_at_once(enter_command: Command, site: Path):
    done = enter_command("render", INFRA / "site.yaml")
    assert all(f"{name} is missing" in done.stderr for name in NAMES)
    done = enter_command("render", site)
    assert (done.returncode, "No such file" in done.stderr) == (2, True)


def test_the_file_to_copy_has_each_value_that_a_file_of_infra_needs_and_no_other():
    sections = yaml.safe_load((INFRA / "site.yaml").read_text())
    assert sorted(f"{section}.{key}" for section, keys in sections.items() for key in keys) == NAMES
