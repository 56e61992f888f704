"""Feed-forwards are left out where they change little, for tokens of answers alone."""

import math
from pydoc_data.topics import topics

import pytest
import torch

from satchel.core.errors import UserError
from satchel.core.request import Request
from satchel.decode.ffn_skip import FFNSkip, Skipping, loss, similarity, steady
from satchel.model.load import load
from satchel.model.source import load_tokenizer
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from tests.decode.common import DRAWN, GREEDY, answers, some_requests
from tests.run.toys import VOCABULARY, toy_decoder
from tests.tolerances import SHARE

LAYERS = 6


@pytest.fixture(scope="module")
def model():
    return toy_decoder(layers=LAYERS)


def engine(model, skip="none", decoding="plain", **limits):
    limits = {"blocks": 64, "batch": 6, "step_tokens": 64, "context": 256} | limits
    return Engine(model, Limits(**limits), decoding=decoding, skip=skip)


def test_a_target_of_nothing_changes_nothing(model):
    for how in (GREEDY, DRAWN):
        requests = some_requests(how)
        skipping = engine(model, "ffn_skip:target=0")
        assert answers(skipping, requests) == answers(engine(model), requests)
        assert skipping.stats()["skipped"] == 0


@pytest.mark.parametrize(("follow", "each"), [(1, 2), (2, 2), (9, 3)])
def test_what_changes_little_is_left_out_in_the_region_after_the_first_tokens(model, follow, each):
    """At a threshold that all meet: layers 1 to 5 run, skip `follow`, run, ..., and the last layer runs."""
    skipping = engine(model, f"ffn_skip:first=1,last=5,threshold=-1,follow={follow},warm=7")
    answers(skipping, [Request(prompt=(5,) * 20, max_tokens=20)])
    tokens = 20 - 1 - 7  # that the model sees after the warm ones; the last one said is not seen
    assert skipping.stats()["skipped"] == tokens * each


def test_prompts_and_the_first_tokens_are_those_of_the_whole_model(model):
    skipping = engine(model, "ffn_skip:first=0,last=6,threshold=-1,follow=3,warm=10")
    requests = [Request(prompt=(9, 8, 7) * 10, max_tokens=60)]
    (dense,), (sparse,) = answers(engine(model), requests), answers(skipping, requests)
    assert sparse[:11] == dense[:11] and sparse != dense


@pytest.mark.parametrize("limits", [{}, {"blocks": 10}, {"step_tokens": 7}])
@pytest.mark.parametrize("decoding", ["plain", "lookup:tokens=3"])
def test_an_answer_is_the_same_alone_and_in_any_company(model, limits, decoding):
    how = "ffn_skip:first=0,last=6,threshold=0.97,follow=2,warm=5"
    requests = some_requests(DRAWN)
    company = engine(model, how, decoding, **limits)
    assert answers(company, requests) == [answers(engine(model, how), [request])[0] for request in requests]
    assert company.stats()["skipped"] > 0


def test_every_layer_has_every_tokens_keys(model):
    """The pool is no numbers before; what is read and was not written would make the answer end in an error."""
    skipping = engine(model, "ffn_skip:first=0,last=6,threshold=-1,follow=5,warm=0")
    skipping.pool.data.fill_(math.nan)
    (said,) = answers(skipping, [Request(prompt=(5, 6, 7), max_tokens=50)])
    assert len(said) == 50


def random_texts(seed, count=4, length=128):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCABULARY, (count, length), generator=rng).tolist()


@pytest.mark.parametrize("target", [0.1, 0.25, 0.4])
def test_the_share_that_is_left_out_of_the_text_is_the_target(model, target):
    texts = random_texts(1, count=8, length=64)
    found = FFNSkip(target=target, harm=100, first=0, last=LAYERS, follow=2).calibrated(model, texts)
    trial = Skipping(LAYERS, found.region, found.threshold, found.follow, 0)
    loss(model, texts, trial)
    assert trial.share == pytest.approx(target, abs=SHARE)


def test_less_is_left_out_where_it_would_do_harm(model):
    """On texts that the model says itself: nothing that is left out makes them likelier."""
    texts = [torch.tensor(greedily(model, (i, 5), 40)).tolist() for i in range(4, 10)]
    shares, dense = [], loss(model, texts)
    for harm in (1e-6, 0.01, 100.0):
        found = FFNSkip(target=0.5, harm=harm, first=0, last=LAYERS).calibrated(model, texts)
        trial = Skipping(LAYERS, found.region, found.threshold, found.follow, 0)
        assert loss(model, texts, trial) <= dense + harm
        shares.append(trial.share)
    assert shares == sorted(shares) and shares[0] < shares[2]


@torch.no_grad()
def greedily(model, prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens


def test_the_region_is_where_the_similarity_does_not_fall():
    assert steady([0.2, 0.95, 0.6, 0.9, 0.92, 0.91, 0.95, 0.96, 0.3, 0.2]) == range(3, 8)
    assert not steady([0.9, 0.7, 0.5, 0.3])


def test_a_model_without_a_region_leaves_out_nothing(model):
    found = FFNSkip(first=3, last=4).calibrated(model, random_texts(1))
    assert found.threshold == math.inf
    found.over(torch.arange(50))
    assert found.eligible == found.skipped == 0


def test_similarity_is_the_cosine_of_the_stream_around_the_feed_forward(model):
    alike_LN = similarity(model, random_texts(1, count=1, length=9))
    assert alike_LN.shape == (LAYERS, 9) and bool((alike_LN.abs() <= 1.001).all())
    streams = []
    with torch.no_grad():
        model.hidden(
            torch.tensor(random_texts(1, count=1, length=9)),
            feed=lambda layer, run, x: streams.append((x, run(x))) or streams[-1][1],
        )
    x_ND, y_ND = streams[2][0][0], streams[2][1][0]
    expected_N = (x_ND * y_ND).sum(1) / (x_ND.norm(dim=1) * y_ND.norm(dim=1))
    torch.testing.assert_close(alike_LN[2], expected_N)


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ("first=4,last=2,threshold=0.9", "first=4, last=2: the model has 6 layers"),
        ("target=0.2", "without a tokenizer"),
    ],
)
def test_what_cannot_be_is_refused(model, knobs, complaint):
    with pytest.raises(UserError, match=complaint):
        engine(model, f"ffn_skip:{knobs}")


class ByChance:
    """Leaves out as many feed-forwards of the same layers, whatever they change."""

    def __init__(self, region, share):
        self.region, self.share, self.rng = region, share, torch.Generator().manual_seed(0)

    def over(self, said_N):
        return self

    def __call__(self, layer, run, x_BTD):
        if layer not in self.region:
            return run(x_BTD)
        out_BT1 = torch.rand(*x_BTD.shape[:2], 1, generator=self.rng) < self.share
        return torch.where(out_BT1, x_BTD, run(x_BTD))


@pytest.mark.slow
def test_a_real_model_loses_less_than_by_chance_at_the_same_share():
    """SmolLM2 on pages of Python's reference that it was not calibrated on."""
    model, tokenizer = load("demo", torch.float32), load_tokenizer("demo")
    pages = [tokenizer.encode(text)[:128] for text in sorted(topics.values(), key=len)[-16:-4]]
    skipping = FFNSkip(harm=100).start(model, tokenizer)
    trial = Skipping(model.config.layers, skipping.region, skipping.threshold, skipping.follow, 0)
    dense, sparse = loss(model, pages), loss(model, pages, trial)
    chance = ByChance(skipping.region, trial.share * model.config.layers / len(skipping.region))
    by_chance = loss(model, pages, chance)
    print(f"region {skipping.region}, threshold {skipping.threshold:.4f}, left out {trial.share:.3f}")
    print(f"loss {dense:.3f} dense, {sparse:.3f} by similarity, {by_chance:.3f} by chance")
    assert skipping.region and trial.share == pytest.approx(0.25, abs=SHARE)
    assert dense < sparse < by_chance
    mild = FFNSkip().start(model, tokenizer)
    trial = Skipping(model.config.layers, mild.region, mild.threshold, mild.follow, 0)
    print(f"loss {loss(model, pages, trial):.3f} with {trial.share:.3f} left out, where a tenth of a nat is allowed")
    assert trial.share < 0.25
