"""The bench of guessing ahead measures every decoding there is, and says what it is worth."""

import pytest

from bench import _speculate_run, speculate
from satchel.core import book


def test_every_decoding_of_the_book_is_measured():
    measured = {text.partition(":")[0] for text in speculate.WAYS.values()}
    assert measured == {entry.name for entry in book.entries() if entry.slot == "decoding"}
    for text in [*speculate.WAYS.values(), *speculate.DRAWN.values()]:
        book.check("decoding", text.format(small="x"))
    skips = {text.partition(":")[0] for text in speculate.SKIPS.values()}
    assert skips == {entry.name for entry in book.entries() if entry.slot == "skip"}
    run = {case["way"]: case["kinds"] for case in speculate.cases("x", quick=False)}
    assert run.keys() == {*speculate.WAYS, *speculate.DRAWN, *speculate.SKIPS}
    assert all(kind in run["plain"] for kinds in run.values() for kind in kinds)


def test_a_tree_stands_beside_a_chain_of_as_many_guesses():
    sizes = {
        way: book.make("decoding", text.format(small="x")).size for way, text in speculate.WAYS.items() if "rsd" in text
    }
    chain = book.make("decoding", speculate.WAYS["draft, 8"].format(small="x"))
    assert sizes["RSD-C, 8"] == sizes["RSD-S, 8"] == chain.tokens == 8


def test_a_row_compares_with_plain_decoding():
    plain = {"cpu_ms": 8.0, "wall_ms": 6.0, "tokens": 100, "steps": 100, "guessed": 0, "right": 0, "drafts": 0}
    plain |= {"left_out": 0.0, "said": [[1, 2], [3, 4]]}
    guessed = plain | {"cpu_ms": 4.0, "wall_ms": 3.0, "steps": 40, "guessed": 80, "right": 60, "drafts": 40}
    found = speculate.row("edit", 0.0, 1, "lookup", [guessed | {"said": [[1, 2], [3, 5]]}], [plain])
    assert (found["right, share"], found["guesses a draft"], found["kept a draft"]) == (0.75, 2.0, 1.5)
    assert found["tokens a step"] == 2.5
    assert (found["speed, CPU"], found["speed, wall"], found["same"]) == (2.0, 2.0, 0.5)
    assert speculate.row("edit", 0.0, 1, "lookup", [{"error": "no room"}], [plain])["failed"] == "no room"


@pytest.mark.slow
def test_the_bench_runs(tmp_path):
    from bench import _speculate_draft

    folder = str(tmp_path / "small")
    assert _speculate_draft.main({"layers": 2, "texts": 16, "steps": 2, "folder": folder})["texts"] == 16
    kinds = [{"prompts": "question", "batch": 1, "temperature": heat, "tokens": 6} for heat in (0.0, 0.7)]
    plain = _speculate_run.main({"kinds": kinds, "decoding": "plain"})["runs"]
    for way in ("draft:model={small}", "specdecpp:model={small}", "rsd:model={small}"):
        found = _speculate_run.main({"kinds": kinds, "decoding": way.format(small=folder)})["runs"]
        assert [run["tokens"] for run in found] == [run["tokens"] for run in plain] == [24, 24]
        assert all(run["guessed"] > 0 for run in found)
