"""The bench of prefilling reads the same prompts in all three ways."""

from bench import prefill
from tests.run.toys import toy_decoder


def test_all_ways_read_all_prompts(monkeypatch):
    monkeypatch.setattr(prefill, "LONGEST", 64)
    monkeypatch.setattr(prefill, "EQUAL", 16)
    monkeypatch.setattr(prefill, "drawn", lambda sizes, seed: [tuple(range(1, size + 1)) for size in sizes])
    table = prefill.compare(toy_decoder().eval(), 4, 1)
    assert [(row["lengths"], row["way"]) for row in table] == [
        (kind, way) for kind in ("long tail", "equal") for way in ("packed", "padded", "one by one")
    ]
    tail, _, equal = table[:3], None, table[3:]
    assert tail[0]["tokens seen"] == tail[2]["tokens seen"] == tail[0]["tokens"] < tail[1]["tokens seen"] == 4 * 64
    assert {row["tokens seen"] for row in equal} == {4 * 16}
    assert all(row["seconds"] >= 0 for row in table) and tail[1]["over padded"] == 1
