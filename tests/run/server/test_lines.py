"""Batches: every line answered once, whatever stops them; a file that is wrong is refused whole."""

import asyncio
import io
import json

import httpx
import openai
import pytest

from satchel.core.errors import DataError, UserError
from satchel.run.server import offline
from satchel.run.server.keys import Bucket, Client, Keys, _digest
from satchel.run.server.lines import answer_lines, read_lines
from satchel.run.server.offline import run_batch
from tests.run.server.toy import Running, toy_house

CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0}


def line(id, url="/v1/completions", **body):
    asked = {"/v1/completions": {"prompt": id, "max_tokens": 5}, "/v1/embeddings": {"input": id}}.get(url, CHAT)
    return {"custom_id": id, "method": "POST", "url": url, "body": asked | body}


MIXED = [
    line("a"),
    line("b", "/v1/chat/completions"),
    line("c", "/v1/embeddings"),
    line("d", n=0),
    line("e", stream=True),
]
MIXED += [line("f", model="none"), line("g", prompt="x" * 900)]


def text(lines):
    return "".join(json.dumps(one) + "\n" for one in lines)


def test_every_line_has_its_answer_and_a_wrong_one_its_error():
    async def run():
        house, answers = toy_house(), []
        await answer_lines(house, read_lines(io.BytesIO(text(MIXED).encode()), "in"), "", answers.append, 3)
        await house.worker.stop()
        return {answer["custom_id"]: answer["response"] for answer in answers}

    found = asyncio.run(run())
    assert {id: one["status_code"] for id, one in found.items()} == {
        "a": 200, "b": 200, "c": 200, "d": 400, "e": 400, "f": 404, "g": 400
    }  # fmt: skip
    assert found["b"]["body"]["object"] == "chat.completion" and len(found["c"]["body"]["data"][0]["embedding"]) == 32
    assert "no streams" in found["e"]["body"]["error"]["message"]


@pytest.mark.parametrize(
    "raw, said",
    [
        (b"", "holds no request"),
        (b"{", "in:1: is not JSON"),
        (b"\xff", "in:1: is not JSON"),
        (b"[]", "in:1: a JSON object"),
        (b'{"custom_id": 3}', "custom_id: a text"),
        (b'{"custom_id": "a", "bod": {}}', "did you mean 'body'"),
        (b'{"custom_id": "a", "url": "/v1/x", "body": {}}', "url: "),
        (b'{"custom_id": "a", "url": "/v1/completions"}', "body: "),
        ((text([line("a")]) * 2).encode(), "in:2: custom_id: 'a' came before"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_its_lines(raw, said):
    with pytest.raises(DataError, match=said):
        read_lines(raw.splitlines(), "in")


@pytest.fixture
def toy_service(monkeypatch):
    """Batches run on the toy; `calls` says how often an engine was made."""

    class Governor:
        def end(self):
            pass

    class Service:
        governor = Governor()

    calls = []
    monkeypatch.setattr(offline, "open_service", lambda job, beside, reserve: calls.append(job) or Service())
    monkeypatch.setattr(offline, "open_house", lambda service, terms: toy_house(terms=terms))
    return calls


def test_a_batch_that_was_killed_goes_on_where_it_was(tmp_path, toy_service):
    source, target = tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl"
    source.write_text(text([line(f"id{i}") for i in range(10)]))
    first = run_batch(None, source, target)
    whole = target.read_bytes().splitlines(keepends=True)
    target.write_bytes(b"".join(whole[:4]) + whole[4][:20])
    told = []
    again = run_batch(None, source, target, lambda said, of: told.append((said, of)))
    assert (first.lines, first.before, again.before, again.failed) == (10, 0, 4, 0)
    assert told == [(n, 10) for n in range(5, 11)]
    answers = [json.loads(one) for one in target.read_bytes().splitlines()]
    assert sorted(one["custom_id"] for one in answers) == sorted(f"id{i}" for i in range(10))
    assert run_batch(None, source, target).before == 10 and len(toy_service) == 2


def test_answers_to_something_else_are_not_gone_on_with(tmp_path, toy_service):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(text([line("a")]))
    target.write_text('{"custom_id": "z"}\n')
    with pytest.raises(UserError, match="answers to something else"):
        run_batch(None, source, target)
    assert not toy_service and target.read_text() == '{"custom_id": "z"}\n'


def test_through_the_server_as_the_official_client_does_it():
    clients = {_digest(f"sk-{name}"): Client(name, Bucket(0, float), Bucket(0, float)) for name in "ab"}
    with Running(Keys(clients)) as server:
        mine = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-a", max_retries=0)
        other = openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-b", max_retries=0)
        lines = [line("x"), line("y", n=0)]
        file = mine.files.create(file=("in.jsonl", text(lines).encode()), purpose="batch")
        asked = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = mine.batches.create(**asked)
        while (batch := mine.batches.retrieve(batch.id)).status == "in_progress":
            pass
        assert batch.status == "completed" and batch.request_counts.completed == batch.request_counts.failed == 1
        assert json.loads(mine.files.content(batch.output_file_id).text)["custom_id"] == "x"
        assert json.loads(mine.files.content(batch.error_file_id).text)["response"]["status_code"] == 400
        assert len(mine.files.list().data) == 3 and not other.files.list().data
        with pytest.raises(openai.NotFoundError):
            other.batches.retrieve(batch.id)
        with pytest.raises(openai.NotFoundError):
            other.batches.create(**asked)
        wrong = mine.files.create(file=("in.jsonl", b"{"), purpose="batch")
        failed = mine.batches.create(**asked | {"input_file_id": wrong.id})
        assert failed.status == "failed" and "not JSON" in failed.errors.data[0].message
        long = mine.files.create(file=("in.jsonl", text([line("z", max_tokens=200, n=8)]).encode()), purpose="batch")
        slow = mine.batches.cancel(mine.batches.create(**asked | {"input_file_id": long.id}).id)
        while (slow := mine.batches.retrieve(slow.id)).status not in ("cancelled", "completed"):
            pass
        assert mine.files.delete(file.id).deleted
        answer = httpx.post(
            f"{server.url}/v1/files", headers={"Authorization": "Bearer sk-a"}, data={"purpose": "batch"}
        )
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "file"
