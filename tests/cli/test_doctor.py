"""The doctor knows every native operator, and says which run here, on which instructions, and what is lost without."""

import pytest
from rich.console import Console

from satchel.cli import _operators
from satchel.core.book import PACKAGE
from satchel.native import build, levels, linear


def shown(table):
    console = Console(width=200)
    with console.capture() as said:
        console.print(table)
    return said.get()


def test_every_operator_has_a_line_and_a_loss():
    sources = {path.stem for path in (PACKAGE / "native").glob("*.cpp")}
    assert sources == set(_operators.LOST) == set(_operators._builds())


def test_without_a_compiler_it_names_the_cure_and_what_is_lost(monkeypatch):
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setattr(_operators, "_builds", lambda: dict.fromkeys(_operators.LOST, lambda: None))
    text = shown(_operators.operators())
    assert text.count("install g++") == len(_operators.LOST)
    assert all(lost in text for lost in _operators.LOST.values())


@pytest.mark.skipif(build.compiler() is None, reason="needs a C++ compiler")
def test_with_one_all_are_ready():
    assert shown(_operators.operators()).count("ready") == len(_operators.LOST)


def test_a_level_that_fails_its_test_is_not_used(monkeypatch):
    monkeypatch.setattr(levels, "supported", lambda: ("avx2", "portable"))
    wrong = {"auto": "portable", "portable": "portable"}
    kernels = {level: linear.Kernel(name, None) for level, name in wrong.items()}
    monkeypatch.setattr(linear, "kernel", lambda level="auto": kernels.get(level))
    lines = {line.split()[0]: line for line in shown(_operators.instructions()).splitlines() if line.split()}
    assert "did not pass" in lines["avx2"] and "used" in lines["portable"] and "passed" in lines["portable"]
    assert "no" in lines["amx"].split() and "passed" not in lines["amx"]
