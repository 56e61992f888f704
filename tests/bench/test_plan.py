"""The plan bench: its grid, its sums, and one real row."""

import sys

import pytest

from bench.plan import HELD_OUT, grid, quick, row, summary
from satchel.core.job import TuneJob
from satchel.native.build import compiler


def test_grid_has_forty_runs_of_three_shapes_with_a_shape_and_a_method_held_out() -> None:
    cases = grid()
    assert len(cases) >= 40 and len({case["shape"] for case in cases}) >= 3
    assert len({str(case) for case in cases}) == len(cases)
    held_out = [case for case in cases if case["shape"] in HELD_OUT]
    assert held_out and any(case["job"].get("optimizer", "").startswith(HELD_OUT[-1]) for case in cases)
    for case in cases:
        TuneJob(**case["job"])


def test_summary_gives_percent_of_the_measured_and_leaves_out_rows_that_a_peer_does_not_cover() -> None:
    pairs = [(100, 100), (102, 100), (95, 100)]
    rows = [
        {name: list(pair) for name in ("tensors", "resident", "seconds")}
        | {"held_out": False, "error_of": dict.fromkeys(("tensors", "resident", "seconds"), pair[0] / pair[1] - 1)}
        | {"peers": {"accelerate": [50.0, 50.0], "fitcheck-llm": "no", "fitscout": "no"}}
        for pair in pairs
    ]
    lines = {line["estimate"]: line for line in summary(rows)}
    ours = lines["satchel, tensors, all rows"]
    assert ours["median, %"] == 2 and ours["worst, %"] == 5 and ours["worst under, %"] == -5
    assert lines["accelerate, tensors against tensors"]["worst under, %"] == -50
    assert lines["fitscout, tensors against tensors"]["rows"] == 0


@pytest.mark.skipif(sys.platform != "linux" or compiler() is None, reason="needs Linux and a C++ compiler")
def test_a_row_of_the_packaged_model_is_predicted() -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("fitcheck")
    pytest.importorskip("fitscout")
    found = row(quick()[0])
    assert "error" not in found, found
    assert abs(found["error_of"]["tensors"]) < 0.03
    assert found["seconds"][1] > 0 and found["resident"][1] > found["tensors"][1]
    assert all(estimate[1] >= estimate[0] > 0 for estimate in found["peers"].values())
