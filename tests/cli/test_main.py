"""What the command line answers, to whom, with which exit code, and how fast."""

import dataclasses
import json
import resource
import subprocess
import sys

import pytest

from satchel.cli.main import main
from satchel.core import book
from satchel.core.job import PretrainJob, TuneJob


@pytest.fixture
def satchel(capsys):
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        said = capsys.readouterr()
        return stopped.value.code or 0, said.out, said.err

    return run


def test_list_names_every_method(satchel):
    code, out, _ = satchel("list")
    assert code == 0
    assert all(entry.name in out and entry.slot in out for entry in book.entries())


def test_list_as_json_is_what_the_book_holds(satchel):
    _, out, _ = satchel("list", "adapter", "--json")
    adapters = [entry.name for entry in book.entries() if entry.slot == "adapter"]
    assert [row["name"] for row in json.loads(out)] == adapters


def test_show_prints_each_knob_with_type_default_and_comment(satchel):
    code, out, _ = satchel("show", "lora")
    assert code == 0
    for knob in book.find("adapter", "lora").knobs:
        line = next(line for line in out.splitlines() if line.startswith(knob.name + " "))
        assert knob.kind in line and str(knob.default) in line
        assert knob.comment.split()[0] in line


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (("show", "lroa"), "did you mean 'lora'"),
        (("list", "adaptor"), "did you mean 'adapter'"),
        (("tune", "--model", "demo", "--btach", "4"), "--batch"),
        (("tune", "--model", "demo"), "'data' is missing"),
        (("tune", "--model", "demo", "--data", "demo", "--adapter", "lora:rnak=4"), "did you mean 'rank'"),
        (("tune", "--model", "demo", "--data", "demo", "--optimizer", "admw"), "no optimizer 'admw'"),
        (("tune", "--model", "demo", "--data", "demo", "--batch", "many"), "integer"),
        (("tune", "--model", "demo", "--data", "demo", "--memory", "2g"), "such as 2GiB"),
        (("tune", "--config", "nowhere.toml"), "cannot be read"),
        (
            ("plan", "tune", "--model", "demo", "--data", "demo", "--eval-share", "0.9"),
            "share of the documents held out, [0, 0.5]",
        ),
        (("plan", "tune", "--model", "demo", "--data", "dmeo.jsonl"), "data: dmeo.jsonl does not exist"),
        (("plan", "pretrain", "--model", "demo", "--data", "demo:1", "--data", "b.txt:2"), "b.txt does not exist"),
        (("pretrain", "--model", "demo", "--data", "a:1", "--data", "b"), "give a weight to every source, or to none"),
        (("pretrain", "--model", "demo", "--data", "a", "--mixture", "fixt"), "did you mean 'fixed'"),
        (("bench", "tnue"), "no bench 'tnue'"),
        (("chat", "dmeo"), "did you mean 'demo'? give a folder"),
        (("chat", "--raw"), "--prompt"),
        (("chat", "--dtype", "fp8"), "it is bf16 or fp32"),
        (("frobnicate",), "No such command"),
    ],
)
def test_a_mistake_ends_with_code_2_and_its_cure(satchel, arguments, cure):
    code, out, err = satchel(*arguments)
    assert code == 2
    assert cure in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in out + err


def test_options_win_over_the_file(satchel, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(sys.modules, "satchel.run.tune", type(sys)("fake"))
    monkeypatch.setattr(sys.modules["satchel.run.tune"], "tune", lambda job, report: seen.append(job), raising=False)
    (tmp_path / "job.toml").write_text('model = "demo"\ndata = "demo"\nbatch = 2\npacking = true\n')
    code, _, _ = satchel("tune", "--config", str(tmp_path / "job.toml"), "--batch", "16", "--no-packing")
    assert (code, seen) == (0, [TuneJob(model="demo", data="demo", batch=16, packing=False)])


@pytest.mark.parametrize("kind", [TuneJob, PretrainJob])
def test_every_field_of_the_job_is_an_option(satchel, kind):
    _, out, _ = satchel(kind.verb, "--help")
    assert all("--" + field.name.replace("_", "-") in out for field in dataclasses.fields(kind))


def test_an_option_that_takes_several_values_is_given_several_times_and_wins_over_the_file(
    satchel, tmp_path, monkeypatch
):
    seen = []
    monkeypatch.setitem(sys.modules, "satchel.run.pretrain", type(sys)("fake"))
    fake = sys.modules["satchel.run.pretrain"]
    monkeypatch.setattr(fake, "pretrain", lambda job, report: seen.append(job), raising=False)
    (tmp_path / "job.toml").write_text('model = "demo"\ndata = ["a:1", "b:2"]\neval_data = ["c"]\nscratch = true\n')
    satchel("pretrain", "--config", str(tmp_path / "job.toml"), "--data", "x:0.5", "--data", "y:0.5", "--steps", "9")
    job = PretrainJob(model="demo", data=("x:0.5", "y:0.5"), eval_data=("c",), scratch=True, steps=9)
    assert seen == [job]


def test_the_version_is_that_of_the_package(satchel):
    assert satchel("--version")[1].strip() == __import__("satchel").__version__


@pytest.mark.parametrize("arguments", [["--help"], ["list"], ["show", "lora"], ["tune", "--help"]])
def test_answers_come_in_half_a_second_without_torch(arguments):
    """In seconds of a machine where the command line's libraries take a tenth of one to be imported: the speed of
    a shared machine changes twofold, theirs with ours."""
    ours = "import sys; from satchel.cli.main import main\ntry: main(%r)\nfinally: assert 'torch' not in sys.modules"
    libraries = "import inspect, json, rich.console, rich.table, tomllib, typer"
    pairs = [(cpu_seconds(ours % arguments), cpu_seconds(libraries)) for _ in range(9)]
    spent, unit = map(sum, zip(*pairs, strict=True))
    assert 0.1 * spent / unit < 0.5


def cpu_seconds(code):
    """What a program takes of a core; what others take meanwhile does not count."""
    before = cpu_seconds_of_children()
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    return cpu_seconds_of_children() - before


def cpu_seconds_of_children():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
