"""The papers say what is so: links lead somewhere, commands exist, tables are those of the records."""

import ast
import importlib
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAPERS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
DOORS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if not path.stem.startswith("_"))


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(paper: Path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", paper.read_text()):
        if "://" not in target:
            assert (paper.parent / target).exists(), f"{paper.name} links to {target}"


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_papers_exist(paper: Path):
    for door in re.findall(r"python -m jobs\.(\w+)", paper.read_text()):
        assert door in DOORS, f"{paper.name} names jobs.{door}"
    for target in re.findall(r"`make (\w+)`", paper.read_text()):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{paper.name}: make {target}"


@pytest.mark.parametrize("door", DOORS)
def test_every_door_answers_help(door: str):
    done = subprocess.run(
        [sys.executable, "-m", f"jobs.{door}", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert f"usage: python -m jobs.{door}" in done.stdout


def test_help_asks_for_nothing_heavy():
    heavy = (
        "import sys; import jobs.train, jobs.suite; sys.exit(any(m in sys.modules for m in ('torch', 'ray', 'lightning')))"
    )
    assert subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, check=False).returncode == 0


def test_the_readmes_tables_are_those_of_the_records():
    bench = importlib.import_module("jobs.bench")
    readme = (ROOT / "README.md").read_text()
    assert bench.with_tables(readme) == readme, "run `make readme`"


def lines_of_code(file: Path) -> int:
    """Lines that hold code: not empty, no comment, no documentation."""
    source = file.read_text()
    strings = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    documentation = {line for node in strings for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(source).readline) if token.type not in layout]
    return len({line for token in tokens for line in range(token.start[0], token.end[0] + 1)} - documentation)


def test_the_house_stays_small():
    assert sum(lines_of_code(file) for room in ("imgcls", "cluster") for file in (ROOT / room).rglob("*.py")) < 6700


def test_files_stay_small():
    for room in ("imgcls", "cluster", "jobs"):
        for file in (ROOT / room).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 420, f"{file} asks for a second room"


def test_ray_environment_is_set_in_one_place():
    for room in ("imgcls", "cluster", "jobs"):
        for file in (ROOT / room).rglob("*.py"):
            if file.name != "session.py":
                assert not re.search(r"environ[^\n]*RAY_", file.read_text()), f"{file} reads or sets Ray's environment"
