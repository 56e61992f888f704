"""What every bench stands on: a finished run is not made again, a failed one is; the folder says of which commit."""

import argparse
import json
from pathlib import Path

import pytest

from bench import _harness
from bench._harness import once, told, workplace


@pytest.fixture
def calls(monkeypatch):
    """The arguments of all measurements; the first one fails."""
    made = []

    def measure(module, argument, timeout_s):
        made.append(argument)
        return {"error": "killed"} if len(made) == 1 else {"value": len(made)}

    monkeypatch.setattr(_harness, "measure", measure)
    return made


def test_what_has_finished_is_kept_and_what_has_failed_is_made_again(tmp_path, calls):
    assert once(tmp_path, "m", {"a": 1})["error"] == "killed"
    second = once(tmp_path, "m", {"a": 1}, folder="here")
    assert second == {"commit": _harness.commit(), "value": 2}
    assert once(tmp_path, "m", {"a": 1}, folder="there") == second and calls == [{"a": 1}, {"a": 1, "folder": "here"}]


def test_another_module_argument_number_or_folder_is_another_measurement(tmp_path, calls):
    once(tmp_path, "m", {"a": 1})
    for home, module, argument, number in (
        ("1", "m", 1, 0),
        ("1", "n", 1, 0),
        ("1", "m", 2, 0),
        ("1", "m", 1, 1),
        ("2", "m", 1, 0),
    ):
        once(tmp_path / home, module, {"a": argument}, number=number)
    assert len(calls) == 6 and len(list(tmp_path.rglob("*.json"))) == 5
    assert all(
        {"module", "argument", "number", "result"} == json.loads(file.read_text()).keys()
        for file in tmp_path.rglob("*.json")
    )


def test_a_workplace_is_kept_if_it_was_given_and_results_do_not_name_it(tmp_path):
    for given in (tmp_path / "a" / "b", None):
        with workplace(given) as folder:
            (folder / "file").touch()
        assert (folder / "file").exists() == (given is not None)
    parser = argparse.ArgumentParser()
    _harness.add_work(parser)
    parser.add_argument("--old", type=Path)
    assert told(parser.parse_args(["--work", "w", "--old", "some/where"])) == {"old": "where"}
