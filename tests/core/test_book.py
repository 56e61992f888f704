import subprocess
import sys

import pytest

from satchel.core import book
from satchel.core.errors import SatchelError, UnknownName

BASE = '''"""Adds a low-rank update.

y' = y + B A x
"""

from dataclasses import dataclass

import a_package_that_is_not_there
from satchel.core.seams import Adapter, Card


@dataclass(frozen=True, kw_only=True)
class Low(Adapter):
    card = Card(paper="https://arxiv.org/abs/1", saves=("gradients",), demo={"rank": 2})

    rank: int = 8  # directions, [1, width]
'''
CHILD = '''"""Adds a low-rank update with a magnitude."""

from satchel.adapt.low import Low
from satchel.core.card import Card


class High(Low):
    card = Card(paper="https://arxiv.org/abs/2")

    dropout: float = 0.0  # share dropped
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    for folder, files in {
        "adapt": {"low": BASE, "high": CHILD, "_shared": "x = 1", "helper": "y = 2"},
        "run": {"trainer": BASE},
    }.items():
        (tmp_path / "satchel" / folder).mkdir(parents=True)
        for stem, text in (files | {"__init__": ""}).items():
            (tmp_path / "satchel" / folder / f"{stem}.py").write_text(text)
    monkeypatch.setattr(book, "PACKAGE", tmp_path / "satchel")
    return tmp_path / "satchel"


def test_methods_are_the_files_of_the_rooms_that_hold_a_card(package):
    assert [(e.slot, e.room, e.name) for e in book.entries()] == [
        ("adapter", "adapt", "high"),
        ("adapter", "adapt", "low"),
    ]


def test_an_entry_says_what_its_file_says(package):
    entry = book.find("adapter", "low")
    assert entry.summary == "Adds a low-rank update."
    assert entry.card.demo == {"rank": 2} and entry.card.fidelity == "exact"
    assert [(k.name, k.default, k.comment) for k in entry.knobs] == [("rank", 8, "directions, [1, width]")]
    assert entry.path == package / "adapt" / "low.py"


def test_a_method_built_on_another_has_its_slot_and_its_knobs(package):
    entry = book.find("adapter", "high")
    assert (entry.slot, [k.name for k in entry.knobs]) == ("adapter", ["rank", "dropout"])


@pytest.mark.parametrize(
    ("slot", "name", "complaint"),
    [
        ("adapter", "hihg", "no adapter 'hihg'; did you mean 'high'"),
        ("adaptor", "low", "no slot 'adaptor'; did you mean 'adapter'"),
    ],
)
def test_an_unknown_name_comes_with_the_nearest(package, slot, name, complaint):
    with pytest.raises(UnknownName, match=complaint):
        book.find(slot, name)


def test_a_spelling_is_checked_without_importing(package):
    book.check("adapter", "low:rank=4")
    with pytest.raises(UnknownName, match="low: no knob 'rnk'; did you mean 'rank'"):
        book.check("adapter", "low:rnk=4")


def test_a_base_may_be_named_with_its_module(package):
    text = CHILD.replace("from satchel.adapt.low import Low", "import satchel.core.seams as seams")
    (package / "adapt" / "other.py").write_text(text.replace("High(Low)", "Other(seams.Adapter)"))
    assert [entry.name for entry in book.entries()] == ["high", "low", "other"]


def test_a_card_that_is_no_literal_is_our_own_mistake(package):
    (package / "adapt" / "low.py").write_text(BASE.replace('paper="https://arxiv.org/abs/1"', "paper=PAPER"))
    with pytest.raises(SatchelError, match="not a literal"):
        book.find("adapter", "low")


@pytest.mark.parametrize("slot", ["adapter", "format", "activations"])
def test_none_leaves_an_optional_slot_empty(slot):
    assert book.make(slot, "none") is None


def test_none_does_not_leave_a_required_slot_empty():
    with pytest.raises(UnknownName, match="no optimizer 'none'"):
        book.make("optimizer", "none")


def test_listing_imports_no_torch():
    code = "import sys; from satchel.core import book; book.entries(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
