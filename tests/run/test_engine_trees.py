"""Trees, chains and no guesses in one batch: the text is plain decoding's, and the pool keeps what it should."""

import random

import pytest
import torch

from satchel.core.request import Request
from satchel.core.serve_seams import Draft, Proposer
from tests.decode.common import DRAWN, GREEDY, answers, engine, some_requests
from tests.run.toys import VOCABULARY, toy_decoder
from tests.tolerances import TOLERANCE


@pytest.fixture(scope="module")
def model():
    return toy_decoder()


class Oracle(Proposer):
    """Knows the answers, and hides them at random places of random trees; of every third answer it says nothing, to
    every other third it proposes a chain."""

    most, width = 24, 8

    def __init__(self, known, seed=0):
        self.known, self.rng = known, random.Random(seed)
        self.gathered = 0

    def propose(self, speakers, room, fed):
        return [self.guess(s, most) if most else Draft() for s, most in zip(speakers, room, strict=True)]

    def guess(self, s, most):
        said = len(s.tokens) - len(s.request.prompt)
        coming = self.known[s.request.prompt][said : said + self.rng.randint(0, 6)]
        coming = coming[: s.request.max_tokens - said - 1]
        if s.id % 3 == 0 or not coming:
            return Draft()
        if s.id % 3 == 1:
            return Draft.chain([*coming[:-1], 4][:most])
        return self.tree(coming, most)

    def tree(self, coming, most):
        """The right branch with wrong ones before, between and beside; none deeper than the right one."""
        tokens, parents, levels, right, done = [], [], [], -1, 0
        while len(tokens) < most and done < len(coming):
            if self.rng.random() < 0.5:
                tokens.append(coming[done])
                parents.append(right)
                right, done = len(tokens) - 1, done + 1
                levels.append(done)
            else:
                shallow = [n for n in range(len(tokens)) if levels[n] < len(coming)]
                parent = self.rng.choice([-1, *shallow])
                token = self.rng.randrange(4, VOCABULARY)
                taken = {t for t, p in zip(tokens, parents, strict=True) if p == parent} | set(coming)
                if token not in taken:
                    tokens.append(token)
                    parents.append(parent)
                    levels.append(1 + (levels[parent] if parent >= 0 else 0))
        return Draft(tokens, parents)

    def learn(self, speaker, draft, path):
        self.gathered += list(path) != list(range(len(path)))


def known_to(model, requests):
    return {r.prompt: said for r, said in zip(requests, answers(engine(model), requests), strict=True)}


@pytest.mark.parametrize("how", [GREEDY, DRAWN])
@pytest.mark.parametrize("limits", [{}, {"blocks": 12}, {"step_tokens": 40}])
def test_any_mixture_of_guesses_gives_the_text_of_none(model, how, limits):
    requests = some_requests(how, count=9, tokens=45)
    known = known_to(model, requests)
    served = engine(model, **({"step_tokens": 128} | limits))
    served.proposer = Oracle(known)
    assert answers(served, requests) == list(known.values())
    stats = served.stats()
    assert stats["right"] > 0 and served.proposer.gathered > 0
    assert stats["preemptions"] > 0 or "blocks" not in limits


def test_blocks_that_were_gathered_are_found_again_and_hold_the_right_keys(model):
    """The answers go on from what the pool has of them as they do in a new engine."""
    requests = some_requests(GREEDY, count=6, tokens=60)
    known = known_to(model, requests)
    served = engine(model, blocks=256, step_tokens=256)
    served.proposer = Oracle(known)
    answers(served, requests)
    assert served.proposer.gathered > 0
    later = [Request(prompt=r.prompt + tuple(known[r.prompt][:50]), max_tokens=8, logprobs=0) for r in requests]
    before = served.stats()["reused"]
    served.proposer = Oracle({r.prompt: () for r in later})
    ours, theirs = (said_with_logprobs(one, later) for one in (served, engine(model, blocks=256)))
    assert served.stats()["reused"] - before >= 6 * 48
    assert [tokens for tokens, _ in ours] == [tokens for tokens, _ in theirs]
    for (_, a), (_, b) in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= TOLERANCE[torch.float32] * b.abs().max().clamp(min=1)


def said_with_logprobs(served, requests):
    ids = [served.submit(request) for request in requests]
    events = served.run()
    served.check_integrity()
    mine = [[e for e in events if e.id == id] for id in ids]
    return [
        ([t for e in some for t in e.tokens], torch.tensor([p.logprob for e in some for p in e.logprobs]))
        for some in mine
    ]


def test_an_answer_that_ends_within_a_tree_ends_there(model):
    request = Request(prompt=(5, 6, 7), max_tokens=40)
    (said,) = answers(engine(model), [request])
    stop = next(token for token in said[5:] if said.index(token) >= 5)
    ending = Request(prompt=(5, 6, 7), max_tokens=40, stop_tokens=(stop,))
    served = engine(model)
    served.proposer = Oracle({request.prompt: said})
    served._next_id = 2  # one that gets trees
    assert answers(served, [ending]) == [said[: said.index(stop) + 1]]
