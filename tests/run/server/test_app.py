"""Every route answers as OpenAI's does, and every mistake is an error that names the field and the cure."""

import asyncio
import base64
import json

import pytest
import torch

from satchel.adapt import save_peft
from satchel.core.book import make
from satchel.model.adapters import attach
from satchel.run.server.house import Terms
from tests.run.server.toy import byte_tokenizer, client_of, toy_house
from tests.run.toys import toy_decoder
from tests.tolerances import same

HELLO = [{"role": "user", "content": "hello"}]
CHAT = {"messages": HELLO, "max_tokens": 6, "temperature": 0}
COUNT = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}, "required": ["a"]}
COUNT["additionalProperties"] = False


def ask(*calls, **house):
    """(status, JSON) of each (method, path, body) against a fresh server."""

    async def run():
        async with client_of(toy_house(**house)) as client:
            return [await one(client, *call) for call in calls]

    return asyncio.run(run())


async def one(client, method, path, body=None):
    sent = {"content": body, "headers": {"content-type": "application/json"}} if isinstance(body, bytes) else {}
    if body is not None and not sent:
        sent = {"json": body}
    answer = await client.request(method, path, **sent)
    return answer.status_code, answer.json() if "json" in answer.headers["content-type"] else answer.text


def chat(**changes):
    return "POST", "/v1/chat/completions", {key: value for key, value in (CHAT | changes).items() if value is not None}


def complete(**changes):
    return "POST", "/v1/completions", {"prompt": "hello", "max_tokens": 6, "temperature": 0} | changes


def events(text):
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_a_chat_is_the_same_whole_and_in_pieces():
    (_, whole), (status, text) = ask(
        chat(logprobs=True, top_logprobs=2),
        chat(logprobs=True, top_logprobs=2, stream=True, stream_options={"include_usage": True}),
    )
    pieces = events(text)
    deltas = [piece["choices"][0] for piece in pieces[:-1]]
    (choice,) = whole["choices"]
    assert status == 200 and whole["object"] == "chat.completion"
    assert deltas[0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(one["delta"].get("content", "") for one in deltas) == choice["message"]["content"]
    assert [one for delta in deltas if delta["logprobs"] for one in delta["logprobs"]["content"]] == choice["logprobs"][
        "content"
    ]
    assert [one["finish_reason"] for one in deltas if one["finish_reason"]] == [choice["finish_reason"]] == ["length"]
    assert pieces[-1]["choices"] == [] and pieces[-1]["usage"]["completion_tokens"] == 6
    assert whole["usage"]["total_tokens"] == whole["usage"]["prompt_tokens"] + 6
    first = choice["logprobs"]["content"][0]
    assert len(first["top_logprobs"]) == 2 and first["top_logprobs"][0]["logprob"] == first["logprob"]
    assert bytes(first["bytes"]).decode(errors="replace") == first["token"]


def test_text_and_its_tokens_and_lists_of_both_are_the_same_prompts():
    (_, text), (_, many) = ask(complete(), complete(prompt=["hello", "hello"]))
    assert [choice["text"] for choice in many["choices"]] == [text["choices"][0]["text"]] * 2
    assert [choice["index"] for choice in many["choices"]] == [0, 1]
    assert many["usage"]["prompt_tokens"] == 2 * text["usage"]["prompt_tokens"]
    ids = toy_ids("hello")
    (_, one), (_, two) = ask(complete(prompt=ids), complete(prompt=[ids, ids]))
    assert one["choices"] == text["choices"] and two["choices"] == many["choices"]


def toy_ids(text):
    return byte_tokenizer().encode(text)


def test_a_prompt_is_scored_by_echo_and_logprobs_without_an_answer():
    ((_, scored), (_, said)) = ask(
        complete(echo=True, logprobs=1, max_tokens=0), complete(echo=True, logprobs=1, max_tokens=1)
    )
    (choice,) = scored["choices"]
    found = choice["logprobs"]
    assert choice["text"] == "hello" == "".join(found["tokens"])
    assert found["token_logprobs"][0] is None and all(value < 0 for value in found["token_logprobs"][1:])
    assert found["text_offset"] == [0, 1, 2, 3, 4]
    for token, value, top in list(zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True))[
        1:
    ]:
        assert top[token] == value and max(top.values()) >= value
    longer = said["choices"][0]["logprobs"]
    assert longer["token_logprobs"][:5] == found["token_logprobs"] and len(longer["tokens"]) == 6


def test_many_answers_are_numbered_and_the_best_are_chosen():
    drawn = {"n": 3, "temperature": 1.0, "seed": 1}
    (_, three), (_, again), (_, best), (_, streamed) = ask(
        complete(**drawn), complete(**drawn), complete(**(drawn | {"n": 1}), best_of=3), complete(**drawn, stream=True)
    )
    texts = [choice["text"] for choice in three["choices"]]
    assert [choice["index"] for choice in three["choices"]] == [0, 1, 2] and len(set(texts)) > 1
    assert three["choices"] == again["choices"]
    assert best["choices"][0]["text"] in texts and best["usage"]["completion_tokens"] == 18
    parts = [choice for piece in events(streamed) for choice in piece["choices"]]
    assert ["".join(part["text"] for part in parts if part["index"] == i) for i in range(3)] == texts


def test_stop_texts_and_biases_are_heeded():
    ((_, plain),) = ask(complete(max_tokens=30))
    text = plain["choices"][0]["text"]
    stop = text[4:6]
    (_, stopped), (_, pushed) = ask(
        complete(max_tokens=30, stop=stop), complete(logit_bias={str(toy_ids("z")[0]): 100}, max_tokens=3)
    )
    (choice,) = stopped["choices"]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    assert pushed["choices"][0]["text"] == "zzz"


@pytest.mark.parametrize("route", [chat, complete])
def test_an_answer_follows_a_schema_whatever_the_model_would_say(route):
    wanted = {"type": "json_schema", "json_schema": {"name": "count", "schema": COUNT}}
    bodies = [route(response_format=wanted, temperature=1.0, seed=seed, max_tokens=60) for seed in range(3)]
    for status, reply in ask(*bodies):
        (choice,) = reply["choices"]
        said = json.loads(choice.get("text") or choice["message"]["content"])
        assert status == 200 and list(said) == ["a"] and said["a"] <= 99 and choice["finish_reason"] == "stop"


TOOL = {"type": "function", "function": {"name": "add", "parameters": COUNT}}


def test_a_call_that_must_come_comes_and_is_read_back():
    body = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 100, "temperature": 1.0, "seed": 3}
    (_, whole), (_, text) = ask(chat(**body), chat(**body, stream=True), context=512)
    (choice,) = whole["choices"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert call["function"]["name"] == "add" and json.loads(call["function"]["arguments"])["a"] <= 99
    deltas = [piece["choices"][0]["delta"] for piece in events(text)]
    (streamed,) = [one for delta in deltas for one in delta.get("tool_calls", ())]
    assert streamed["function"] == call["function"] and not any(delta.get("content") for delta in deltas)


def test_a_conversation_with_calls_goes_through_the_template():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [*HELLO, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "2"}]
    ((status, reply),) = ask(chat(messages=turns))
    assert status == 200 and reply["usage"]["prompt_tokens"] > 60


def test_the_models_are_listed_and_an_unknown_one_is_not_found():
    (_, listed), (status, found), (missing, fault), (asked, same) = ask(
        ("GET", "/v1/models"), ("GET", "/v1/models/toy"), ("GET", "/v1/models/tyo"), chat(model="tyo")
    )
    assert [model["id"] for model in listed["data"]] == ["toy"] and status == 200 and found["id"] == "toy"
    assert missing == asked == 404 and fault == same
    assert same["error"] == {
        "message": "no model 'tyo'; did you mean 'toy'?",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


MISTAKES = [
    (chat(tempratur=1), "did you mean 'temperature'"),
    (chat(temperature=-1), "temperature: "),
    (chat(temperature="hot"), "temperature: "),
    (chat(messages=[]), "messages: "),
    (chat(messages=[{"role": "boss", "content": "x"}]), "messages[0].role: "),
    (chat(messages=[{"role": "user"}]), "'content' is missing"),
    (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "reads text parts only"),
    (chat(messages=None), "messages: this field is missing"),
    (chat(n=0), "n: "),
    (chat(top_logprobs=3), "needs logprobs=true"),
    (chat(logit_bias={"x": 1}), "no token id"),
    (chat(logit_bias={"9999": 1}), "token 9999"),
    (chat(stop=["a"] * 20), "stop: "),
    (chat(stop=[""]), "stop[0]: "),
    (chat(seed=2**70), "seed: "),
    (chat(max_tokens=500), "this engine takes 256 together"),
    (chat(messages=[{"role": "user", "content": "x" * 300}]), "this engine takes 256 together"),
    (chat(response_format={"type": "json_schema"}), "json_schema"),
    (chat(response_format={"type": "yaml"}), "response_format.type: "),
    (chat(tool_choice="required"), "a tool that is not there"),
    (complete(prompt=[]), "prompt: "),
    (complete(prompt=[[1], "x"]), "prompt: "),
    (complete(prompt=[[1], [9999]]), "token 9999"),
    (complete(prompt=[True]), "prompt: "),
    (complete(n=3, best_of=2), "best_of"),
    (complete(best_of=2, stream=True), "best of many"),
    (complete(max_tokens=0), "needs echo"),
    (complete(suffix="x"), "suffix: "),
    (("POST", "/v1/chat/completions", b'{"messages": "\xff"}'), "not UTF-8: byte 0xff at 14"),
    (("POST", "/v1/chat/completions", b'{"messages": ['), "not JSON"),
    (("POST", "/v1/chat/completions", b"[1]"), "must be a JSON object"),
    (("POST", "/v1/chat/completions", b'{"messages":[{"role":"user","content":"\\ud800"}]}'), "messages[0].content"),
    (("POST", "/v1/completions", b'{"prompt": "x", "temperature": NaN}'), "temperature: "),
    (("POST", "/v1/completions", b"[" * 100_000), ""),
]


def test_every_mistake_is_told_with_its_path():
    for (call, said), (status, body) in zip(MISTAKES, ask(*(call for call, _ in MISTAKES)), strict=True):
        assert status == 400, (call, body)
        assert said in body["error"]["message"], (call, body)
        assert body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "strange"},
        {"type": "object", "properties": {"a": False}, "required": ["a"]},
        {"$ref": "#/nowhere"},
        {"type": "string", "pattern": "("},
    ],
)
def test_a_schema_that_cannot_be_met_is_refused(schema):
    ((status, body),) = ask(
        chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    )
    assert status == 400 and "cannot be followed" in body["error"]["message"]
    assert body["error"]["param"] == "response_format.json_schema.schema"


def test_a_template_without_tools_refuses_them_and_says_so():
    ((status, body),) = ask(chat(tools=[TOOL]), template="{% for m in messages %}{{ m.content }}{% endfor %}")
    assert status == 400 and "knows no tools" in body["error"]["message"]


def test_a_model_without_a_template_refuses_to_chat():
    ((status, body),) = ask(chat(), template=None)
    assert status == 400 and "no chat template" in body["error"]["message"]


def test_a_body_that_is_too_large_is_refused():
    ((status, body),) = ask(chat(messages=[{"role": "user", "content": "x" * 5000}]), terms=Terms(body_bytes=1000))
    assert status == 413 and "1000 bytes" in body["error"]["message"]


def test_an_unknown_path_and_method_are_errors_in_the_same_shape():
    (status, body), (wrong, other) = ask(("GET", "/v2/chat"), ("GET", "/v1/chat/completions"))
    assert (status, wrong) == (404, 405) and body["error"]["message"] and other["error"]["message"]


def test_figures_have_the_names_that_dashboards_know():
    _, (_, text), (_, stats), (health, _), (ready, _) = ask(
        chat(), ("GET", "/metrics"), ("GET", "/stats"), ("GET", "/health"), ("GET", "/ready")
    )
    for line in (
        'vllm:num_requests_running{model_name="toy"} 0.0',
        'vllm:generation_tokens_total{model_name="toy"} 6.0',
        'vllm:request_success_total{finished_reason="length",model_name="toy"} 1.0',
        'vllm:time_to_first_token_seconds_count{model_name="toy"} 1.0',
        'vllm:kv_cache_usage_perc{model_name="toy"} 0.0',
    ):
        assert line in text
    assert stats["answered"] == 6 and stats["memory"]["kv free"] > 0
    assert health == ready == 200


def embed(texts, **changes):
    return "POST", "/v1/embeddings", {"input": texts} | changes


def test_an_embedding_is_the_mean_of_the_last_states_whatever_the_steps_and_the_pool():
    long = "a text of some length, " * 6
    (_, one), (_, again), (_, packed) = ask(
        embed(long), embed(["x", long]), embed([toy_ids(long)], encoding_format="base64")
    )
    model = toy_decoder(vocab=258)
    with torch.no_grad():
        mean = model.hidden(torch.tensor([toy_ids(long)]))[0].mean(0)
    wanted = mean / mean.norm()
    for found in (one["data"][0], again["data"][1]):
        assert same(torch.tensor(found["embedding"]), wanted)
    raw = base64.b64decode(packed["data"][0]["embedding"])
    assert same(torch.frombuffer(bytearray(raw), dtype=torch.float32), wanted)
    assert one["usage"] == {"prompt_tokens": len(long), "total_tokens": len(long)}
    ((_, parts),) = ask(embed(long), step_tokens=16)
    assert same(torch.tensor(parts["data"][0]["embedding"]), wanted)


def test_embeddings_refuse_what_they_cannot_do():
    (wrong, body), (long, _) = ask(embed("x", dimensions=5), embed("x" * 400))
    assert wrong == long == 400 and "have 32" in body["error"]["message"]


def test_adapters_come_and_go_while_serving(tmp_path):
    def on(path):
        return "POST", "/v1/load_lora_adapter", {"lora_name": "tuned", "lora_path": path}

    off = "POST", "/v1/unload_lora_adapter", {"lora_name": "tuned"}
    model = toy_decoder(vocab=258)
    attach(model, make("adapter", "lora:rank=2"), torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("B_OR"):
                parameter.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    save_peft(model, tmp_path / "first")

    async def run():
        house = toy_house()
        house.adapters = tmp_path
        async with client_of(house) as client:
            calls = [complete(), on("first"), complete(model="tuned"), on("first"), on("../x"), on("none"), off, off]
            return [await one(client, *call) for call in [*calls, complete(model="tuned"), ("GET", "/v1/models")]]

    plain, loaded, tuned, twice, outside, missing, gone, again, late, listed = asyncio.run(run())
    assert (plain[0], loaded[0], tuned[0], gone[0]) == (200,) * 4
    assert tuned[1]["choices"][0]["text"] != plain[1]["choices"][0]["text"]
    assert (twice[0], outside[0], missing[0], again[0], late[0]) == (400, 403, 400, 404, 404)
    assert len(listed[1]["data"]) == 1
    ((refused, _),) = ask(on("first"))
    assert refused == 403


def test_an_adapter_that_is_taken_away_while_a_request_for_it_comes_is_a_model_that_is_not_there(monkeypatch):
    async def run():
        house = toy_house()
        monkeypatch.setattr(house, "adapter", lambda model: model)  # as it was a moment ago
        async with client_of(house) as client:
            return await one(client, *complete(model="gone"))

    status, body = asyncio.run(run())
    assert status == 404 and body["error"]["code"] == "model_not_found" and body["error"]["param"] == "model"


def test_the_routes_are_described_without_anything_from_elsewhere():
    ((status, page), (_, openapi)) = ask(("GET", "/docs"), ("GET", "/openapi.json"))
    assert status == 200 and "http://" not in page and "https://" not in page and "<script" not in page
    assert all(path.replace("&", "&amp;") in page for path in openapi["paths"])
    assert "<code>deadline_ms</code></td><td>integer ≥ 1 ≤ 2147483647, or null" in page
    assert "<code>messages</code></td><td>array of Message</td><td>must be given" in page
