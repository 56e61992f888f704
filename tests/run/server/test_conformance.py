"""Others' tools against the server: schemathesis finds no 5xx, lm-eval's local-completions the model's own numbers."""

import hypothesis
import pytest
import torch

from satchel.run.server.house import Terms
from tests.run.server.toy import Running, byte_tokenizer
from tests.run.toys import toy_decoder
from tests.tolerances import same

schemathesis = pytest.importorskip("schemathesis")


def check_all(operation):
    """Bodies that the schema of one route allows."""

    @hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(case=operation.as_strategy())
    def check(case):
        case.call_and_validate(checks=[schemathesis.checks.not_a_server_error])

    check()


@pytest.mark.slow
def test_nothing_that_the_schema_allows_is_our_fault():
    with Running(terms=Terms(timeout_s=2.0), context=64, batch=16) as server:
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        operations = [found.ok() for found in schema.get_all_operations()]
        for operation in operations:
            check_all(operation)
    assert len(operations) > 15


@pytest.mark.slow
def test_lm_eval_scores_and_generates_through_the_server(tmp_path):
    api = pytest.importorskip("lm_eval.models.openai_completions")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path)
    pairs = [("the sky is", " blue"), ("two and", " two make four"), ("a", "b")]
    with Running() as server:
        client = api.LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model="toy",
            tokenizer=str(tmp_path),
            tokenizer_backend="huggingface",
        )
        asked = [instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
        scored = client.loglikelihood(asked)
        until = instance("generate_until", {}, ("hello", {"until": ["zzz"], "max_gen_toks": 8, "temperature": 0}), 0)
        (said,) = client.generate_until([until])
    model = toy_decoder(vocab=258).eval()
    for (context, text), (score, is_greedy) in zip(pairs, scored, strict=True):
        begin, tokens = len(tokenizer.encode(context)), tokenizer.encode(context + text)
        with torch.no_grad():
            logprob_TV = model(torch.tensor([tokens]))[0].log_softmax(-1)
        rows = range(begin - 1, len(tokens) - 1)
        assert same(torch.tensor(score), sum(logprob_TV[row, tokens[row + 1]] for row in rows))
        assert is_greedy == all(int(logprob_TV[row].argmax()) == tokens[row + 1] for row in rows)
    tokens = tokenizer.encode("hello")
    for _ in range(8):
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert said == tokenizer.decode(tokens[5:])
