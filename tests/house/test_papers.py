"""The papers say what is so: links lead somewhere, and the house is as small as they say. Commands: test_commands.py."""

import ast
import importlib
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAPERS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("infra/*.md"), *ROOT.glob("sandbox/*.md")]
DOORS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if not path.stem.startswith("_"))


def anchors_of(paper: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", paper.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("paper", PAPERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(paper: Path):
    for target in re.findall(r"\]\(([^)]+)\)", paper.read_text()):
        if "://" not in target:
            name, _, anchor = target.partition("#")
            file = paper.parent / name if name else paper
            assert file.exists(), f"{paper.name} links to {target}"
            assert not anchor or anchor in anchors_of(file), f"{paper.name} links to {target}"


def test_the_readme_is_a_screen_and_a_half():
    assert len((ROOT / "README.md").read_bytes()) <= 9000


def test_each_guide_is_found_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for guide in ROOT.glob("docs/*.md"):
        assert f"](docs/{guide.name})" in readme


def messages_of(file: Path) -> Iterator[str]:
    """The strings in a module, each as a whole, whatever stands for the values in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_messages_in_troubleshooting_are_those_of_the_code():
    rows = re.findall(r"^\|([^|]*)\|", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
    files = [file for room in ("imgcls", "cluster", "jobs") for file in (ROOT / room).rglob("*.py")]
    messages = [message for file in files for message in messages_of(file)]
    for quoted in re.findall(r"`([^`]+)`", "".join(rows)):
        assert any(quoted in message for message in messages), f"no message has: {quoted}"


def test_the_variables_that_we_read_are_in_their_guide():
    guide = (ROOT / "docs/environment.md").read_text()
    kernels = importlib.import_module("imgcls.training.environment").KERNEL_CHOICES
    sources = "".join(file.read_text() for room in ("imgcls", "cluster", "jobs") for file in (ROOT / room).rglob("*.py"))
    for name in {*kernels, *re.findall(r"IMGCLS_[A-Z_]+", sources)}:
        assert f"`{name}`" in guide, name


def test_the_guides_name_every_catalogue_each_command_that_can_be_a_job_and_each_flag_whose_file_goes_with_it():
    staging, catalogues = (importlib.import_module(name) for name in ("cluster.send.staging", "imgcls.catalogue"))
    cluster, results = ((ROOT / f"docs/{name}.md").read_text() for name in ("cluster", "results"))
    assert not [name for name in (*staging.PLACES, *staging.FILE_FLAGS) if f"`{name}`" not in cluster]
    assert not [name for name in catalogues.CATALOGUES if f"| `{name}` |" not in results]
    for file in ("docs/commands.md", "jobs/_request.py", "jobs/bench.py"):
        (listed,) = re.findall(r"^.*quick.*paper.*tuned.*$", (ROOT / file).read_text(), re.MULTILINE)
        assert not catalogues.CATALOGUES.keys() - set(re.findall(r"[a-z]+", listed)), file


def test_the_guides_price_table_has_the_node_types_of_infra(tmp_path: Path):
    prices = importlib.import_module("cluster.foretell.prices")
    nodes = importlib.import_module("cluster.placement").defined_nodes(ROOT / "infra/ray/aws.yaml")
    (table,) = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/plan-and-cost.md").read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "prices.yaml").write_text(table)
    assert prices.read_prices(tmp_path / "prices.yaml").node_types.keys() == {node.type for node in nodes}


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


BOUND, JOBS_BOUND = 7121, 1169


def files_of(*rooms: str) -> list[Path]:
    return [file for room in rooms for file in (ROOT / room).rglob("*.py")]


def test_the_house_stays_small():
    """These bounds only go down, but for the allowance that an issue names."""
    assert sum(map(lines_of_code, files_of("imgcls", "cluster"))) <= BOUND
    assert sum(map(lines_of_code, files_of("jobs"))) <= JOBS_BOUND


def test_functions_stay_small():
    for file in files_of("imgcls", "cluster", "jobs"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                parameters = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert (node.end_lineno or node.lineno) - node.lineno < 45, f"{file}: {node.name} is too long"
                assert len([name for name in parameters if name not in ("self", "cls")]) <= 9, f"{file}: {node.name}"


NAMES = (
    "result.json",
    "config.json",
    "history.csv",
    "lease.json",
    "began.json",
    "committed.json",
    "model.pt",
    "predictions.npy",
)


def test_the_names_of_a_runs_files_stand_in_one_module():
    for file in files_of("imgcls", "cluster", "jobs", "sandbox"):
        named = [name for name in NAMES if name in file.read_text()]
        assert not named or file == ROOT / "imgcls" / "runs.py", f"{file} names {', '.join(named)}"


def test_files_stay_small():
    for room in ("imgcls", "cluster", "jobs"):
        for file in (ROOT / room).rglob("*.py"):
            assert len(file.read_text().splitlines()) <= 420, f"{file} asks for a second room"


def test_ray_environment_is_set_in_one_place():
    for room in ("imgcls", "cluster", "jobs"):
        for file in (ROOT / room).rglob("*.py"):
            if file.name != "session.py":
                assert not re.search(r"environ[^\n]*RAY_", file.read_text()), f"{file} reads or sets Ray's environment"
