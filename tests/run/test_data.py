"""What is learnt, what is held out, what happens to long records, and that all problems arrive at once."""

import json

import numpy as np
import pytest

from satchel.core.errors import DataError, UserError
from satchel.core.job import TuneJob
from satchel.run.data import read_dataset, split, tokenize
from tests.run.toys import ASSISTANT, END, USER, CharTokenizer

TOKENIZER = CharTokenizer()


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def words(count, prefix="document"):
    return [{"text": f"{prefix} number {i} {'x' * (i % 23)}"} for i in range(count)]


def documents(rows):
    """The text of every document of unsplit rows."""
    spans = zip(rows.starts_P, rows.lengths_P, strict=True)
    return sorted(TOKENIZER.decode(rows.corpus.tokens_N[a : a + n]) for a, n in spans)


def test_text_is_learnt_everywhere_and_ends_with_the_end_token(tmp_path):
    corpus = tokenize(jsonl(tmp_path / "x.jsonl", [{"text": "ab"}]), TOKENIZER, 8)
    assert corpus.tokens_N.tolist() == [*TOKENIZER.encode("ab"), END]
    assert corpus.learnt_N.all() and corpus.tokens_N.dtype == np.int32 and corpus.learnt_N.dtype == bool


def test_of_prompt_and_completion_only_the_completion_is_learnt(tmp_path):
    corpus = tokenize(jsonl(tmp_path / "x.jsonl", [{"prompt": "abc", "completion": "de"}]), TOKENIZER, 8)
    assert corpus.tokens_N[corpus.learnt_N].tolist() == [*TOKENIZER.encode("de"), END]
    assert corpus.tokens_N[~corpus.learnt_N].tolist() == TOKENIZER.encode("abc")


def test_of_a_chat_only_what_the_assistant_says_is_learnt(tmp_path):
    turns = [("user", "ab"), ("assistant", "c"), ("user", "d"), ("assistant", "ef")]
    messages = [{"role": role, "content": content} for role, content in turns]
    corpus = tokenize(jsonl(tmp_path / "x.jsonl", [{"messages": messages}]), TOKENIZER, 32)
    said = [*TOKENIZER.encode("c"), END, *TOKENIZER.encode("ef"), END]
    assert corpus.tokens_N[corpus.learnt_N].tolist() == said
    assert corpus.tokens_N[0] == USER and corpus.tokens_N[4] == ASSISTANT


def test_every_problem_of_every_file_is_reported_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": 1}\nnot json\n')
    (tmp_path / "b.jsonl").write_text('{"instruction": "q"}\n')
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(DataError) as caught:
        tokenize(str(tmp_path), TOKENIZER, 8)
    assert len(caught.value.problems) == 4
    assert [p.split(": ")[0].rsplit("/", 1)[1] for p in caught.value.problems] == [
        "a.jsonl:2",
        "a.jsonl:3",
        "b.jsonl:1",
        "c.jsonl",
    ]


def test_mixed_kinds_of_record_name_both_places(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"text": "a"}, {"prompt": "q", "completion": "a"}])
    with pytest.raises(DataError, match=r"x\.jsonl:2: a completion record, but .*x\.jsonl:1 began with text"):
        tokenize(path, TOKENIZER, 8)


def test_a_long_text_is_split_and_loses_no_target(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"text": "abcdefghij"}])
    dataset = read_dataset(TuneJob(model="m", data=path, context=4, eval_share=0.0), TOKENIZER)
    batch = dataset.train.batch(range(len(dataset.train)))
    assert sorted(batch.lengths) == [2, 4, 4] and batch.count == 10
    assert sorted(batch.targets_1N[0].tolist()) == sorted([*TOKENIZER.encode("bcdefghij"), END])
    assert dataset.notes == ("1 texts are longer than the context of 4 tokens and were split",)


def test_a_long_completion_is_cut_and_counted(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": "ab", "completion": "cdefgh"}, {"prompt": "a", "completion": "b"}])
    corpus = tokenize(path, TOKENIZER, 4)
    assert np.diff(corpus.starts_M1).tolist() == [5, 3]
    assert corpus.notes == ("1 completion records are longer than the context of 4 tokens and were cut",)


def test_an_answer_behind_the_cut_is_a_problem(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [{"prompt": "abcdef", "completion": "g"}, {"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r"x\.jsonl:1: what is to be learnt begins behind the context of 4 tokens"):
        tokenize(path, TOKENIZER, 4)


@pytest.mark.parametrize("share, count", [(0.0, 0), (0.001, 1), (0.1, 10), (0.5, 50)])
def test_held_out_and_trained_documents_are_all_documents_once(tmp_path, share, count):
    path = jsonl(tmp_path / "x.jsonl", words(100))
    dataset = read_dataset(TuneJob(model="m", data=path, context=128, eval_share=share), TOKENIZER)
    trained, held = documents(dataset.train), documents(dataset.held_out)
    assert len(held) == count and sorted(trained + held) == sorted(r["text"] for r in words(100))
    again = read_dataset(TuneJob(model="m", data=path, context=128, eval_share=share), TOKENIZER)
    assert again.fingerprint() == dataset.fingerprint()
    if count > 1:
        other = read_dataset(TuneJob(model="m", data=path, context=128, eval_share=share, seed=1), TOKENIZER)
        assert documents(other.held_out) != held


def test_equal_documents_are_never_on_both_sides(tmp_path):
    corpus = tokenize(jsonl(tmp_path / "x.jsonl", words(20) * 3), TOKENIZER, 128)
    kept, held = split(corpus, 0.3, seed=0)
    assert len(held) == 18 and {i % 20 for i in kept}.isdisjoint({i % 20 for i in held})


def test_a_single_document_is_trained_on_and_says_so(tmp_path):
    dataset = read_dataset(TuneJob(model="m", data=jsonl(tmp_path / "x.jsonl", words(1)), context=128), TOKENIZER)
    assert len(dataset.train) == 1 and len(dataset.held_out) == 0
    assert "nothing is held out" in dataset.notes[0]


def test_named_held_out_data_is_used_and_overlap_is_told(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", words(10))
    other = jsonl(tmp_path / "y.jsonl", words(2) + words(3, "other"))
    dataset = read_dataset(TuneJob(model="m", data=path, eval_data=other, context=128), TOKENIZER)
    assert len(documents(dataset.train)) == 10 and len(documents(dataset.held_out)) == 5
    assert dataset.notes == ("2 held-out documents are in the training data too",)
    wrong = jsonl(tmp_path / "z.jsonl", [{"prompt": "q", "completion": "a"}])
    with pytest.raises(UserError, match="eval_data: holds completion records, but data holds text"):
        read_dataset(TuneJob(model="m", data=path, eval_data=wrong, context=128), TOKENIZER)


def test_an_evaluation_takes_no_more_rows_than_asked_and_says_so(tmp_path):
    jsonl(tmp_path / "d.jsonl", words(60))
    job = TuneJob(model="demo", data=str(tmp_path / "d.jsonl"), eval_share=0.5, context=16, packing=False)
    whole, some = (read_dataset(job.replace(eval_rows=count), CharTokenizer()) for count in (0, 5))
    assert len(whole.held_out) > 5 == len(some.held_out)
    assert some.train.digest() == whole.train.digest() and len(some.notes) == len(whole.notes) + 1
    assert some.notes[-1] == f"the held-out loss is that of 5 of {len(whole.held_out)} rows; --eval-rows 0 takes all"


def test_the_fingerprint_sees_a_changed_token(tmp_path):
    job = TuneJob(model="m", data=jsonl(tmp_path / "x.jsonl", words(9)), context=16)
    first = read_dataset(job, TOKENIZER).fingerprint()
    changed = words(9)
    changed[4]["text"] += "!"
    jsonl(tmp_path / "x.jsonl", changed)
    assert read_dataset(job, TOKENIZER).fingerprint() != first
