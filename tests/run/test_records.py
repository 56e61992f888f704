"""Every malformed record is named with file, line, field and cure; well-formed ones arrive in a fixed order."""

import json
from pydoc_data.topics import topics

import pytest

from satchel.core.errors import UserError
from satchel.run.records import DOCUMENT_CHARS, find_files, kind_of, read_records


def read(source):
    problems = []
    records = [
        (str(place), r, kind_of(r, place, problems.append)) for place, r in read_records(str(source), problems.append)
    ]
    return records, problems


def jsonl(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def chat(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_demo_is_the_language_reference_in_sorted_order():
    records, problems = read("demo")
    assert not problems
    assert [place for place, _, _ in records] == [f"demo/{name}" for name in sorted(topics)]
    assert records[0][1]["text"] == topics[sorted(topics)[0]]


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    (tmp_path / "b").mkdir()
    jsonl(tmp_path / "b" / "x.jsonl", {"text": "third"})
    jsonl(tmp_path / "a.jsonl", {"text": "first"}, "", {"text": "second"})
    (tmp_path / "c.txt").write_text("fourth")
    (tmp_path / "ignored.png").write_bytes(b"\x89PNG")
    records, problems = read(tmp_path)
    assert not problems
    assert [r["text"] for _, r, _ in records] == ["first", "second", "third", "fourth"]
    assert [place.rsplit("/", 1)[1] for place, _, _ in records] == ["a.jsonl:1", "a.jsonl:3", "x.jsonl:1", "c.txt:1"]


def test_parquet_gives_what_jsonl_gives(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": "a", "prompt": None, "completion": None}, {"text": None, "prompt": "q", "completion": "a"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    records, problems = read(tmp_path / "x.parquet")
    assert [kind for _, _, kind in records] == ["text", "completion"] and not problems
    chats = [chat(("user", "hi"), ("assistant", "ho"))]
    pq.write_table(pa.Table.from_pylist(chats), tmp_path / "y.parquet")
    assert read(tmp_path / "y.parquet")[0][0][1:] == (chats[0], "chat")


def test_a_long_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path):
    text = "".join(f"line {i} of some length\n" + ("\n" if i % 40 == 0 else "") for i in range(3000))
    (tmp_path / "long.txt").write_text(text)
    records, problems = read(tmp_path / "long.txt")
    assert not problems and "".join(r["text"] for _, r, _ in records) == text
    assert len(records) > 3 and all(len(r["text"]) >= DOCUMENT_CHARS for _, r, _ in records[:-1])
    lines = text.splitlines()
    for place, record, _ in records:
        assert lines[int(place.rsplit(":", 1)[1]) - 1] == record["text"].splitlines()[0]


MALFORMED = [  # a line of JSONL, and what its complaint must say
    ('{"text": "a"', "broken JSON", "one JSON object a line"),
    ("[1, 2]", "a list, not an object", "one JSON object"),
    ("17", "a number, not an object", "one JSON object"),
    ("[" * 100_000, "nested too deeply", "one JSON object"),
    ({}, "the record is empty", "needs 'text'"),
    ({"label": 3}, "has only 'label'", "needs 'text'"),
    ({"text": 5}, "field 'text' is a number", "write a string"),
    ({"text": None}, "field 'text' is null", "write a value"),
    ({"text": "  "}, "field 'text' is empty", "remove the record"),
    ({"prompt": "q"}, "field 'prompt' stands without 'completion'", "add 'completion'"),
    (
        {"prompt": "q", "response": "a"},
        "field 'prompt' stands without 'completion'",
        "rename 'response' to 'completion'",
    ),
    ({"completion": "a"}, "field 'completion' stands without 'prompt'", "add 'prompt'"),
    ({"prompt": "q", "completion": ""}, "field 'completion' is empty", "write the answer"),
    ({"prompt": 1, "completion": "a"}, "field 'prompt' is a number", "write a string"),
    ({"prompt": [{"role": "user"}], "completion": "a"}, "field 'prompt' is a list", "into 'messages'"),
    ({"instruction": "q", "input": "", "output": "a"}, "field 'instruction' is not read", "to 'prompt'"),
    ({"question": "q", "answer": "a"}, "field 'question' is not read", "rename 'question' to 'prompt'"),
    ({"conversations": []}, "field 'conversations' is not read", "rename 'conversations' to 'messages'"),
    ({"content": "x"}, "field 'content' is not read", "rename 'content' to 'text'"),
    ({"text": "x", "prompt": "q", "completion": "a"}, "has 'text' and 'prompt'", "keep one of them"),
    ({"messages": []}, "field 'messages' is an empty list", "write a list"),
    ({"messages": "hi"}, "field 'messages' is a string", "write a list"),
    ({"messages": ["hi"]}, "field 'messages[0]' is a string", "write {'role'"),
    ({"messages": [{"from": "human", "value": "x"}]}, "field 'messages[0]' has no 'role'", "rename 'from' to 'role'"),
    ({"messages": [{"role": "user"}]}, "field 'messages[0]' has no 'content'", "add it"),
    (chat(("human", "q"), ("assistant", "a")), "messages[0]' has the unknown role 'human'", "did you mean 'user'?"),
    (chat(("asistant", "a")), "unknown role 'asistant'", "did you mean 'assistant'?"),
    (chat(("user", "q"), ("assistant", " ")), "messages[1]' is an empty assistant turn", "remove the turn"),
    (chat(("user", "q")), "no assistant turn", "add one or remove"),
    (chat(("user", "q"), ("assistant", ["a"])), "messages[1]' has a list as 'content'", "write a string"),
]


@pytest.mark.parametrize("line, wrong, cure", MALFORMED, ids=[wrong for _, wrong, _ in MALFORMED])
def test_a_malformed_record_is_named_with_its_line_field_and_cure(tmp_path, line, wrong, cure):
    path = jsonl(tmp_path / "x.jsonl", {"text": "fine"}, line)
    _, problems = read(path)
    assert len(problems) >= 1 and all(p.startswith(f"{path}:2: ") for p in problems)
    assert any(wrong in p and cure in p for p in problems), problems


def test_bytes_that_are_no_utf8_are_named(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    (tmp_path / "y.txt").write_bytes(b"fine\n\xff\n")
    records, problems = read(tmp_path)
    assert len(records) == 1 and len(problems) == 2
    assert "x.jsonl:2: byte 11 is not UTF-8" in problems[0] and "y.txt: invalid start byte" in problems[1]


def test_an_empty_file_and_a_broken_parquet_are_problems(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    (tmp_path / "c.txt").write_text("")
    records, problems = read(tmp_path)
    assert not records and len(problems) == 3
    assert (
        "a.jsonl: the file is empty" in problems[0] and "not a whole Parquet" in problems[1] and "empty" in problems[2]
    )


def test_a_source_that_is_not_there_names_the_nearest(tmp_path):
    jsonl(tmp_path / "train.jsonl", {"text": "a"})
    with pytest.raises(UserError, match=r"did you mean 'train\.jsonl'"):
        read(tmp_path / "trian.jsonl")
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(UserError, match="'.csv', which is not read; one JSON object a line"):
        read(tmp_path / "x.csv")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no .jsonl"):
        read(tmp_path / "none")


def test_text_that_is_no_text_is_told_once_with_its_cure(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "a"}\n{"text": "b"}\n'.encode("utf-16"))
    (tmp_path / "b.jsonl").write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    (tmp_path / "c.txt").write_bytes(b"one\ntwo \0 three\n")
    records, problems = read(tmp_path)
    assert not records and len(problems) == 3
    cures = ("save it as UTF-8", "one a line, without brackets", "c.txt:2: a zero byte")
    assert all(cure in problem for cure, problem in zip(cures, problems, strict=True))


def test_half_a_character_is_a_problem_of_its_record(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "bad \\ud83d"}\n')
    (tmp_path / "y.jsonl").write_text('{"messages": [{"role": "assistant", "content": "\\udc00"}]}\n')
    (tmp_path / "z.jsonl").write_text('{"text": "whole \\ud83d\\ude00"}\n')
    problems = []
    kinds = [kind_of(record, place, problems.append) for place, record in read_records(str(tmp_path), problems.append)]
    assert kinds == [None, None, "text"] and len(problems) == 2
    assert "field 'text' holds half a character, '\\ud83d'" in problems[0] and "'messages'" in problems[1]


def test_only_data_is_offered_for_a_misspelt_name(tmp_path):
    (tmp_path / "notes.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "nots.py").write_text("")
    with pytest.raises(UserError, match=r"did you mean 'notes\.jsonl'\? 'demo' is"):
        find_files(str(tmp_path / "nots.jsonl"))
