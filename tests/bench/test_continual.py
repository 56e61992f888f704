"""The continual bench compares like with like, and says of each run what it forgot and gained."""

import pytest

from bench import _harness, continual
from satchel.core.job import PretrainJob
from satchel.model.source import find_source, load_tokenizer


@pytest.fixture
def bench(tmp_path):
    """Made-up measurements: the old text's loss rises to 2 + rise, the new one's falls to `new`, in every run."""
    made = continual.Bench(tmp_path, steps=10, every=5)
    for number, run in enumerate(continual.RUNS):
        for seed in (0, 1):
            rise = number / 10 + seed / 50
            losses = {"old": [(0, 2.0), (5, 2.0 + rise), (10, 2.0 + rise / 2)], "new": [(0, 4.0), (5, 3.5), (10, 3.0)]}
            made.found.append({"run": run.name, "seed": seed, "losses": losses, "cpu_s": 1.0})
    return made


def test_every_run_is_a_valid_job_that_sees_as_many_tokens_as_the_one_that_it_is_compared_with():
    names = [run.name for run in continual.RUNS]
    for run in continual.RUNS:
        PretrainJob.from_dict({"model": "m", **run.fields, "steps": 9})
        assert not run.after or names.index(run.after) < names.index(run.name)
        assert run.length == (2 if run.name == continual.UNION else 1)


def test_a_row_says_what_was_forgotten_and_gained(bench):
    cells = continual.row(bench, continual.RUNS[1])
    assert cells["phases"] == 2 and cells["gained"].startswith("1.000 ±")
    assert cells["forgotten"].startswith("0.055 ±") and cells["gap depth"].startswith("0.110 ±")
    assert cells["recovered at step"] == "not, not"
    assert continual.row(bench, continual.RUNS[0])["forgotten"] == ""
    nothing = continual.row(continual.Bench(bench.work, 10, 5), continual.RUNS[0])
    assert nothing["mean"] == "not measured" and list(nothing) == list(cells)


def test_findings_are_ratios_of_means_of_the_runs_that_are_there(bench):
    found = continual.findings(bench)
    assert found["new text with replay over without, re-warmed"] == 1.0
    assert found["re-warm and replay over union, mean loss"] == pytest.approx((2 + 0.41 / 2 + 3) / (2 + 0.51 / 2 + 3))
    few = continual.findings(
        continual.Bench(bench.work, 10, 5, [r for r in bench.found if r["run"] != continual.UNION])
    )
    assert found.keys() - few.keys() == {"re-warm and replay over union, mean loss"}


def test_a_run_that_is_there_is_not_run_again(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        _harness,
        "measure",
        lambda module, fields, limit: (
            calls.append(fields) or {"losses": {"old": [[0, 1.0]], "new": [[0, 1.0]]}, "cpu_s": 1.0}
        ),
    )
    (tmp_path / "0").mkdir()
    first = continual.Bench(tmp_path, 10, 5).run(continual.RUNS[0], 0)
    assert continual.Bench(tmp_path, 10, 5).run(continual.RUNS[0], 0) == first and len(calls) == 1
    continual.Bench(tmp_path, 20, 5).run(continual.RUNS[0], 0)
    assert len(calls) == 2
    for run in continual.RUNS[1:]:
        continual.Bench(tmp_path, 10, 5).run(run, 0)
    assert len(calls) == 1 + len(continual.RUNS)  # no two of them are taken for one another


def test_the_gaps_are_drawn(bench, tmp_path):
    continual.draw(bench, tmp_path / "gap.png")
    assert (tmp_path / "gap.png").read_bytes().startswith(b"\x89PNG")


def test_texts_get_a_tokenizer_and_a_shape_that_belong_together(tmp_path):
    for name, word in (("a", "speech "), ("b", "function ")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(word * 400)
    work = tmp_path / "work"
    work.mkdir()
    continual.prepare(work, tmp_path / "a", tmp_path / "b")
    source = find_source(str(work / "shape"), weights=False)
    tokenizer = load_tokenizer(source)
    assert tokenizer.decode(tokenizer.encode("speech function")) == "speech function"
    assert tokenizer.eos_id is not None and source.config.context == continual.CONTEXT
    assert 5_000_000 <= source.config.parameters <= 10_000_000


def test_without_folders_there_is_text_on_every_machine():
    documents, modules = list(continual.documentation()), list(continual.code())
    assert sum(map(len, documents)) > 10**6 < sum(map(len, modules))
