"""From a job's sources to one stream: names, weights, held-out rows of each source, and what the user is told."""

import json

import pytest

from satchel.core.errors import UserError
from satchel.run.sources import FOLDER, names_of, read_sources
from tests.run.toys import CharTokenizer, toy_pretraining, toy_text

TOKENIZER = CharTokenizer()


def read(folder, **changes):
    return read_sources(toy_pretraining(folder, **changes), TOKENIZER)


def texts(rows):
    return TOKENIZER.decode(rows.batch(range(len(rows))).tokens_1N[0].tolist())


def test_each_source_has_rows_of_its_own_to_train_on_and_others_to_evaluate(tmp_path):
    dataset = read(tmp_path)
    assert list(dataset.train.parts) == list(dataset.held_out.parts) == ["large", "small"]
    for name, letters in (("large", "abc"), ("small", "xyz")):
        train, held = texts(dataset.train.parts[name]), texts(dataset.held_out.parts[name])
        assert letters in train and letters in held
        assert not [word for word in held.split("text ")[1:-1] if f"text {word}" in train]


def test_the_tokens_lie_beside_the_output_and_are_shared_by_runs(tmp_path):
    first = read(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / FOLDER).rglob("*.bin")}
    again = read(tmp_path, out=str(tmp_path / "other"))
    assert stamps and {path: path.stat().st_mtime_ns for path in (tmp_path / FOLDER).rglob("*.bin")} == stamps
    assert first.fingerprint() == again.fingerprint()


def test_a_seed_moves_the_split_and_the_weights_are_part_of_the_data(tmp_path):
    same, seed, weights = (
        read(tmp_path, **changes)
        for changes in ({}, {"seed": 1}, {"data": tuple(d[:-1] + "1" for d in toy_pretraining(tmp_path).data)})
    )
    assert len({each.fingerprint() for each in (same, seed, weights)}) == 3
    assert weights.held_out.digest() != seed.held_out.digest()


def test_what_is_only_evaluated_is_evaluated_whole_and_overlap_is_told(tmp_path):
    watched = toy_text(tmp_path / "other.jsonl", 30, "qrs")
    dataset = read(tmp_path, eval_data=(watched,))
    assert list(dataset.train.parts) == ["large", "small"] and list(dataset.held_out.parts) == [
        "large",
        "small",
        "other",
    ]
    assert texts(dataset.held_out.parts["other"]).count("text") == 30
    assert dataset.notes[-1] == "other: 4 of 30 documents to evaluate are in the training data too"


def test_a_source_of_weight_0_is_evaluated_and_never_drawn(tmp_path):
    data = toy_pretraining(tmp_path).data
    dataset = read(tmp_path, data=(data[0], data[1].replace(":1", ":0")))
    steps, total = dataset.train.length(6, 10, 0)
    assert len(dataset.held_out.parts["small"]) and dataset.train.fed(6, total, 0, steps)["small"] == 0


def test_the_run_says_beforehand_how_much_of_each_source_it_will_see(tmp_path):
    dataset = read(tmp_path, steps=6)
    fed = dataset.train.fed(6, 36, 0, 6)
    small = dataset.train.parts["small"].tokens
    share, passes = fed["small"] / sum(fed.values()), fed["small"] / small
    assert f"small: {small:,} tokens, {share:.1%} of the run, {passes:.2f} passes" in dataset.notes
    assert 0.3 < share < 0.37


def test_an_evaluation_takes_as_many_rows_of_each_source_as_asked(tmp_path):
    dataset = read(tmp_path, eval_share=0.5, eval_rows=2)
    assert [len(part) for part in dataset.held_out.parts.values()] == [2, 2]


def test_a_source_too_little_to_split_is_trained_on_and_says_so(tmp_path):
    (tmp_path / "one.txt").write_text("a single document that is a little longer than nothing")
    dataset = read(tmp_path, data=(str(tmp_path / "one.txt"),))
    assert not len(dataset.held_out) and "one: nothing is held out" in dataset.notes[-1]


def test_a_source_without_anything_to_train_on_is_refused(tmp_path):
    (tmp_path / "lone.jsonl").write_text(json.dumps({"text": "a"}) + "\n")
    tokenizer = CharTokenizer()
    tokenizer.eos_id = None  # then a text of one letter predicts nothing
    with pytest.raises(UserError, match="nothing of lone is left to train on"):
        read_sources(toy_pretraining(tmp_path, data=(str(tmp_path / "lone.jsonl"),)), tokenizer)


def test_a_source_that_is_not_there_is_told_before_any_is_tokenized(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl does not exist"):
        read(tmp_path, eval_data=(str(tmp_path / "nowhere.jsonl"),))
    assert not (tmp_path / FOLDER).exists()


def test_a_source_is_called_by_its_file_or_folder_and_by_its_path_where_two_are_called_the_same():
    paths = ["x/wiki.jsonl", "news/", "v1.2", "a/code.txt", "b/code.txt", "demo"]
    assert names_of(paths) == ["wiki", "news", "v1.2", "a/code.txt", "b/code.txt", "demo"]
