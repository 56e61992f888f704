"""What the documents say is so: generated parts are fresh, links and commands exist, examples are valid jobs."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from satchel.core.job import TuneJob
from tests.test_house import FLAGS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page: page.read_text() for page in PAGES}
COMMANDS = sorted(
    {
        line.removeprefix("$ ").partition("  #")[0].strip()
        for page in PAGES
        for block in re.findall(r"```console\n(.*?)```", TEXT[page], re.S)
        for line in block.splitlines()
        if line.removeprefix("$ ").startswith("satchel ")
    }
)


def test_generated_parts_are_fresh():
    finished = subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\((?!http)([^)#]+)", TEXT[page]):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_in_the_documents_has_a_verb_and_flags_that_exist(command):
    words = shlex.split(command)[1:]
    verb = next((verb for verb in FLAGS if words[: len(verb.split())] == verb.split()), None)
    assert verb, f"no verb in {command}"
    flags = {word for word in words if word.startswith("--")}
    assert flags <= set(FLAGS[verb].split()), command


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=lambda path: path.name)
def test_an_example_is_a_valid_job(path):
    assert TuneJob.from_toml(path).out.startswith("runs/")


@pytest.mark.slow
def test_the_python_of_the_readme_runs():
    code = re.search(r"```python\n(.*?)```", TEXT[ROOT / "README.md"], re.S)[1]
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.slow
def test_the_demo_goes_from_plan_to_receipt():
    script = f'satchel() {{ "{sys.executable}" -m satchel "$@"; }}; export -f satchel; bash examples/demo.sh'
    finished = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "too big" in finished.stdout and "Receipt" in finished.stdout
