"""What the documents say is so: generated parts are fresh, links and commands exist, examples are valid jobs."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from satchel.core.job import TuneJob
from satchel.native.build import compiler
from tests.test_house import FLAGS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: page.read_text() for page in PAGES}


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


def commands(text):
    """The command lines of a page's console blocks, and those within its sentences."""
    lines = [line for block in blocks(text, "console") for line in block.splitlines()]
    shown = [line.removeprefix("$ ").partition("  #")[0].strip() for line in lines] + re.findall(r"`([^`\n]+)`", text)
    return {line for line in shown if line.startswith(("satchel ", "make "))}


COMMANDS = sorted(set().union(*map(commands, TEXT.values())))


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*.json")), ids=lambda path: path.stem)
def test_a_table_of_results_shows_all_that_its_rows_hold(path):
    section = (ROOT / "docs" / "RESULTS.md").read_text().partition(f"\n## {path.stem}\n")[2].partition("\n## ")[0]
    heads = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][:1]
    rows = json.loads(path.read_text()).get("table", [])
    assert {column for row in rows for column in row} == {column for head in heads for column in head}


def test_generated_parts_are_fresh():
    finished = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", TEXT[page]):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_in_the_documents_has_a_verb_and_flags_that_exist(command):
    program, *words = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M), command
        return
    verb = next((verb for verb in FLAGS if words[: len(verb.split())] == verb.split()), None)
    assert verb, f"no verb in {command}"
    flags = {word for word in words if word.startswith("--")}
    assert flags <= {"--help", *FLAGS[verb].split()}, command


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_an_example_is_a_valid_job(path):
    assert TuneJob.from_toml(path).out.startswith("runs/")


def test_the_tour_shows_the_commands_that_the_demo_runs():
    script = (ROOT / "examples" / "demo.sh").read_text().replace("$MEMORY", "1100MiB")
    shown = re.findall(r"^\$ (.*)$", (ROOT / "docs" / "tour.txt").read_text(), re.M)
    assert shown == [
        double or single for double, single in re.findall(r"""^run (?:"([^"]*)"|'([^']*)')""", script, re.M)
    ]


@pytest.mark.slow
def test_the_python_of_the_readme_runs():
    code = re.search(r"```python\n(.*?)```", TEXT[ROOT / "README.md"], re.S)[1]
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
def test_the_python_of_the_optimizers_page_runs():
    code = "".join(blocks(TEXT[ROOT / "docs" / "OPTIMIZERS.md"], "python"))
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
def test_the_quickstart_runs_as_it_stands(tmp_path):
    page = TEXT[ROOT / "docs" / "quickstart.md"]
    (tmp_path / "job.toml").write_text(blocks(page, "toml")[0])
    (tmp_path / "chats.jsonl").write_text((blocks(page, "json")[0].splitlines()[0] + "\n") * 20)
    console = blocks(page, "console")[1]
    script = f'satchel() {{ "{sys.executable}" -m satchel "$@"; }}; set -ex; {console}'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert (tmp_path / "runs" / "chats-merged" / "model.safetensors").exists()


@pytest.mark.slow
def test_the_demo_goes_from_plan_to_receipt():
    script = f'satchel() {{ "{sys.executable}" -m satchel "$@"; }}; export -f satchel; bash examples/demo.sh'
    finished = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "too big" in finished.stdout and "Receipt" in finished.stdout


def test_the_python_of_the_native_page_runs():
    if compiler() is None:
        pytest.skip("needs a C++ compiler")
    code = "".join(blocks(TEXT[ROOT / "docs" / "NATIVE.md"], "python"))
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
