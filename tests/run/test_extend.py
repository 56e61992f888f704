"""A shallow run extended to a deep one: tested on runs whose answer is known."""

from satchel.run.extend import extend, shallow, stand_ins, total_work
from satchel.run.tracker import Label, Segment, Tracker, Work


def fake_run(depth: int, kept: int = 10, extra: int = 3) -> Tracker:
    """Each layer keeps `kept` bytes in its forward, frees them in its backward, and leaves a gradient of 4."""
    tracker = Tracker()
    tracker.segments = [Segment(("load", "model"))]
    tracker.segments[0].events = [(layer, 100) for layer in range(depth)]
    tracker.labels = {layer: Label("weights", layer) for layer in range(depth)}
    for layer in range(depth):
        events = [(1000 + layer, kept), (2000 + layer, extra), (2000 + layer, -extra)]
        tracker.segments.append(Segment(("train", "forward", layer), events))
        tracker.segments[-1].work[Work("bfloat16", 7, 1)] += 2
    for layer in reversed(range(depth)):
        tracker.segments.append(Segment(("train", "backward", layer), [(3000 + layer, 4), (1000 + layer, -kept)]))
        tracker.labels[3000 + layer] = Label("gradients", layer)
    tracker.segments.append(Segment(("train", "update"), [(3000 + layer, -4) for layer in range(depth)]))
    return tracker


def test_three_layers_extended_equal_the_deep_run() -> None:
    stands = stand_ins("a" * 12, shallow("a" * 12))
    assert stands == [0, *[1] * 10, 2]
    short, whole = fake_run(3), fake_run(12)
    assert extend(short, stands) == extend(whole, list(range(12)))
    assert total_work(short.segments, stands) == total_work(whole.segments, list(range(12)))


def test_the_peak_moves_from_one_end_of_the_backward_pass_to_the_other_with_depth() -> None:
    """What extending the peaks of shallow runs by a straight line would miss."""
    for kept in (1, 30):  # gradients outweigh what is kept, and the other way round
        whole = extend(fake_run(9, kept), list(range(9)))
        assert extend(fake_run(3, kept), stand_ins("a" * 9, shallow("a" * 9))) == whole


def test_every_kind_of_layer_stands_for_its_own() -> None:
    kinds = "lllllglllllglllllg"
    layers = shallow(kinds)
    stands = stand_ins(kinds, layers)
    assert len(stands) == len(kinds)
    assert all(kinds[layers[stand]] == kind for stand, kind in zip(stands, kinds, strict=True))
    assert layers == [0, 1, 4, 5, 6, 17]


def test_a_last_layer_of_its_own_kind_is_the_shallow_runs_last() -> None:
    layers = shallow("dsssssd")
    assert layers == [0, 1, 2, 5, 6] and stand_ins("dsssssd", layers) == [0, 1, 2, 2, 2, 3, 4]


def test_a_model_that_is_shallow_already_is_run_as_it_is() -> None:
    assert shallow("aa") == [0, 1] == stand_ins("aa", [0, 1])
    assert shallow("a") == [0] == stand_ins("a", [0])


def test_accounts_add_up_to_the_peak() -> None:
    for phase in extend(fake_run(5), list(range(5))):
        assert sum(phase.accounts.values()) == phase.peak_bytes


def test_phases_are_named_by_the_first_part_of_a_segments_name() -> None:
    assert [phase.name for phase in extend(fake_run(5), list(range(5)))] == ["load", "train"]


def test_a_run_that_ends_within_its_blocks_is_extended_too() -> None:
    """As work without an update is: the last segment is a block's backward."""
    segments = fake_run(3).segments[:-1]
    assert total_work(segments, [0, 1, 1, 1, 2]) == {Work("bfloat16", 7, 1): 10}
