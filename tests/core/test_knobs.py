import re

import pytest

from satchel.core.errors import UnknownName, UserError
from satchel.core.knobs import REQUIRED, Knob, parse_knobs, read_knobs

SOURCE = """
import torch  # never imported by the reader


class Method:
    other: int = 3


class Galore(Method):
    card = Card(paper="#")
    shared: ClassVar[int] = 1
    name: str  # who
    rank: int = 128  # directions kept, [1, width]
    where: tuple[str, ...] = ("q", "v")
    scale: float = 0.25  # factor on the update, (0, 1]
    cap: float | None = None
    kind: Literal["left", "right"] = "left"
    fast: bool = (
        True
    )  # behind a bracket
"""


@pytest.fixture
def knobs(tmp_path):
    (tmp_path / "galore.py").write_text(SOURCE)
    return read_knobs(tmp_path / "galore.py", "Galore")


def test_knobs_are_the_fields_with_their_comments(knobs):
    assert [k.name for k in knobs] == ["name", "rank", "where", "scale", "cap", "kind", "fast"]
    assert knobs[0] == Knob(name="name", kind="str", default=REQUIRED, comment="who")
    assert knobs[1] == Knob(name="rank", kind="int", default=128, comment="directions kept, [1, width]")
    assert knobs[2].default == ("q", "v")
    assert knobs[6].comment == "behind a bracket"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", {}),
        ("rank=64", {"rank": 64}),
        (" rank = 64 , scale=1 ", {"rank": 64, "scale": 1.0}),
        ("where=q+k+v,fast=false", {"where": ("q", "k", "v"), "fast": False}),
        ("cap=none,kind=right", {"cap": None, "kind": "right"}),
        ("cap=2", {"cap": 2.0}),
    ],
)
def test_spellings_become_typed_values(knobs, text, values):
    assert parse_knobs(text, knobs, "galore") == values


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("rnak=64", "galore: no knob 'rnak'; did you mean 'rank'"),
        ("rank=many", "galore: rank='many' is not of type int, such as the default 128"),
        ("rank=1.5", "not of type int"),
        ("rank", "galore: 'rank' lacks a value; write rank=128"),
        ("rank=1,rank=2", "rank is given twice"),
        ("scale=0", "galore: scale=0 is outside its range: factor on the update, (0, 1]"),
        ("scale=1.01", "outside its range"),
        ("scale=nan", "outside its range"),
        ("fast=maybe", "not of type bool"),
        ("kind=up", "not of type Literal"),
    ],
)
def test_a_bad_spelling_names_the_cure(knobs, text, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        parse_knobs(text, knobs, "galore")


def test_an_unknown_knob_carries_what_is_known(knobs):
    with pytest.raises(UnknownName) as caught:
        parse_knobs("xyz=1", knobs, "galore")
    assert "rank" in caught.value.known


@pytest.mark.parametrize(
    ("kind", "value", "taken"),
    [
        ("float", 1, 1.0),
        ("int", 2, 2),
        ("bool", True, True),
        ("tuple[int, ...]", [1, 2], (1, 2)),
        ("int | None", None, None),
    ],
)
def test_plain_values_of_the_right_kind_are_taken(kind, value, taken):
    got = Knob(name="k", kind=kind, default=None).accept(value, "job")
    assert got == taken and type(got) is type(taken)


@pytest.mark.parametrize(
    ("kind", "value"), [("int", True), ("int", "8"), ("int", 8.0), ("float", "1"), ("bool", 1), ("str", 3)]
)
def test_plain_values_of_another_kind_are_refused(kind, value):
    with pytest.raises(UserError, match="not of type"):
        Knob(name="k", kind=kind, default=REQUIRED).accept(value, "job")
