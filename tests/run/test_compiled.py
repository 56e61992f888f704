"""Operators that are compiled say what they said one by one, in a few graphs for all layers and all lengths."""

import random
import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from satchel.core.request import Request, Sampling
from satchel.core.serve_seams import Draft
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.forward import Part, hidden
from satchel.model.linear import swap
from satchel.model.norm import RMSNorm
from satchel.model.paged import PAGE, Pool
from satchel.native.build import compiler as cxx
from satchel.run import compiled as unit
from satchel.run.compiled import Compiled
from satchel.run.graphs import Eager, Recorded
from tests.model.families import CASES
from tests.run.test_adapters import llama, write_adapter
from tests.run.test_engine import answers
from tests.run.test_graphs import SAMPLINGS, Again, asked, elsewhere, engine
from tests.run.toys import toy_decoder
from tests.tolerances import same

HANDFUL = 8  # graphs of a model: norms, rotations and the gate of one row and of many, one softmax for each window
GUESSES = Draft((5, 6, 7, 8), (-1, -1, 0, 2))  # a tree


class Counted:
    """Runs a graph's operators one by one, as Python does: counts graphs, and how often they run."""

    def __init__(self):
        self.graphs, self.runs = [], 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.runs += 1
            return graph.forward(*args)

        self.graphs.append(graph)
        return run


def broken(graph, inputs):
    raise RuntimeError("Cannot find a working triton installation")


@pytest.fixture(autouse=True)
def in_torch(monkeypatch):
    """As on a GPU: no compiled kernel of ours, and nothing that another test has compiled."""
    monkeypatch.setattr("satchel.native.paged.library", lambda: None)
    monkeypatch.setattr("satchel.native.pointwise.library", lambda: None)
    torch.compiler.reset()
    counters.clear()


@pytest.fixture
def told(monkeypatch):
    """Lines of the log."""
    lines = []
    monkeypatch.setattr(unit.log, "warning", lambda message, extra: lines.append(extra["fields"]["why"]))
    return lines


def toy(family="llama", dtype=torch.float32):
    name, changes = CASES[family]
    sizes = {"vocab_size": 200, "max_position_embeddings": 512}
    decoder = Decoder(ModelConfig.from_hf(changes | sizes | {"model_type": name}), dtype).eval()
    decoder.init_weights(torch.Generator().manual_seed(7), std=0.1)
    return decoder


def runner(compiler, recorder=None):
    def make(model, pages):
        how = Compiled(compiler)
        return Recorded(model, pages, recorder, how) if recorder else Eager(model, pages, how)

    return make


def ragged(count, seed):
    """Sequences of uneven pasts and new tokens, some with a tree of guesses."""
    rng, parts, first = random.Random(seed), [], 0
    for number in range(count):
        past, new = rng.randrange(90), rng.choice([1, 1, 2, 7, 20, 150])
        draft = GUESSES if rng.random() < 0.4 else Draft()
        table = list(range(20 * number, 20 * number + 20))
        parts.append(Part([rng.randrange(4, 130) for _ in range(new)], draft, table, past, first, 0))
        first += parts[-1].fed
    return parts


def states(runner, parts):
    """What a runner makes of a step, and what the pool holds then."""
    pages, count = runner.pages, sum(part.fed for part in parts)
    pages.data.copy_(torch.randn(pages.data.shape, generator=torch.Generator().manual_seed(0)))
    return runner.hidden(parts)[:count].clone(), pages.data.clone()


def both(model, compiler, dtype=torch.float32):
    """A runner that has compiled, and one that has not."""
    ours, theirs = (make(one, Pool(model.config, 160, dtype).pages) for make, one in model_twice(model, compiler))
    ours.warm(8, 4)
    return ours, theirs


def model_twice(model, compiler):
    plain = Decoder(model.config, model.dtype).eval()
    plain.load_state_dict(model.state_dict())
    return [(runner(compiler), model), (Eager, plain)]


@pytest.mark.skipif(cxx() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_states_and_cache_are_those_of_eager_steps_whatever_the_batch(dtype, told):
    """Compiled by torch's own compiler, into C++."""
    ours, theirs = both(toy(dtype=dtype), unit.inductor, dtype)
    for seed in range(12):
        parts = ragged(1 + seed % 8, seed)
        for found, expected in zip(states(ours, parts), states(theirs, parts), strict=True):
            assert same(found, expected)
    assert ours.compiled.graphs <= HANDFUL and not told


@pytest.mark.parametrize("family", ["gemma2", "mixtral"])
def test_other_families_are_compiled_as_far_as_they_have_such_operators(family, told):
    counted = Counted()
    ours, theirs = both(toy(family), counted)
    for seed in range(4):
        parts = ragged(1 + 2 * seed, seed)
        for found, expected in zip(states(ours, parts), states(theirs, parts), strict=True):
            assert same(found, expected)
    assert 0 < len(counted.graphs) <= HANDFUL and not told


@pytest.mark.parametrize(("how", "limits"), [(SAMPLINGS[0], {}), (SAMPLINGS[1], {"blocks": 12})])
def test_answers_are_those_of_eager_steps(how, limits, told):
    served = engine(toy(), runner(Counted(), Again()), "lookup:tokens=5", **limits)
    assert answers(served, asked(how)) == answers(engine(toy(), Eager, **limits), asked(how))
    assert served.stats()["replayed"] and served.stats()["guessed"] and not told


def test_nothing_is_compiled_in_a_storm_of_sizes_in_another_thread_than_the_start(told):
    counted = Counted()
    ours, _ = both(toy("gemma2"), counted)
    graphs, frames = len(counted.graphs), counters["frames"]["total"]
    assert graphs <= HANDFUL

    def storm():
        torch.set_num_threads(1)
        for seed in range(25):
            states(ours, ragged(1 + seed % 8, seed))

    thread = threading.Thread(target=storm)
    thread.start()
    thread.join()
    assert len(counted.graphs) == graphs and counters["frames"]["total"] == frames and not told


def test_layers_share_their_graphs():
    for layers in (2, 5):
        torch.compiler.reset()
        counted, config = Counted(), replace(toy_decoder().config, layers=layers)
        Eager(Decoder(config).eval(), Pool(config, 2, torch.float32).pages, Compiled(counted)).warm(8, 0)
        assert len(counted.graphs) == 4  # its heads do not rotate


def test_a_recorded_step_runs_what_was_compiled():
    class Watched(Again):
        def __call__(self, run):
            again, out = super().__call__(run)

            def replay():
                before = counted.runs
                again()
                runs.append(counted.runs - before)

            return replay, out

    counted, runs, model = Counted(), [], toy()
    served = engine(model, runner(counted, Watched()))
    answers(served, asked(Sampling()))
    each = len(model.layers) * (2 + 2 + 1 + 1) + 1  # norms, rotations, the gate, a softmax of few pages; the last norm
    assert Counter(runs) == {each: served.stats()["replayed"]}


@pytest.mark.parametrize("family", ["llama-3.1", "mistral-sliding", "gemma2", "gpt2"])
def test_what_is_compiled_stays_on_the_device_and_waits_for_no_number(family):
    """On a device without numbers, all in one graph: torch would break it where something waits."""
    counted = Counted()
    model, pool = elsewhere(family)
    Eager(model, pool.pages, Compiled(counted)).warm(3, 4)
    values = [node.meta.get("example_value") for graph in counted.graphs for node in graph.graph.nodes]
    devices = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    assert devices == {"meta"} and 0 < len(counted.graphs) <= HANDFUL and not counters["graph_break"]


def test_adapters_that_come_later_run_beside_what_was_compiled(tmp_path, told):
    folder = write_adapter(tmp_path / "poet", 4, 1, make_model=llama)
    requests = [Request(prompt=(9, 8, 7 + i), max_tokens=8, adapter=name) for i in range(3) for name in ("poet", None)]
    said, counted = [], Counted()
    for how in (runner(counted, Again()), Eager):
        served = engine(llama(), how)
        served.register("poet", folder)
        before = counted.runs
        for request in requests:
            served.submit(request)
        said.append([(event.id, event.tokens) for event in served.run()])
        assert (counted.runs > before) == (how is not Eager)
    assert said[0] == said[1] and not told
    poet, bare = ([token for id, some in said[0] if id == number for token in some] for number in (0, 1))
    assert len(poet) == len(bare) == 8 and poet != bare  # of the same prompt


def test_hooks_are_called_and_modules_may_be_swapped(told):
    model, calls = llama(), []
    served = engine(model, runner(Counted()))
    model.layers[1].input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    norm, other = RMSNorm(32, 1e-6, False, False), nn.Linear(32, 48, bias=False)
    norm.weight.data.fill_(0.7)
    other.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    plain = llama()
    for each in (model, plain):
        swap(each, "model.layers.0.input_layernorm", norm)
        swap(each, "model.layers.1.mlp.up_proj", other)
    said = answers(served, asked(Sampling()))
    assert (
        said == answers(engine(plain, Eager), asked(Sampling())) != answers(engine(llama(), Eager), asked(Sampling()))
    )
    assert len(calls) == served.stats()["steps"] and not told


def test_without_a_working_compiler_steps_run_eagerly_and_the_log_says_so_once(told):
    served = engine(toy(), runner(broken, Again()))
    assert answers(served, asked(Sampling())) == answers(engine(toy(), Eager), asked(Sampling()))
    assert told == ["RuntimeError: Cannot find a working triton installation"]
    assert served.stats()["replayed"] and not served.runner.compiled.graphs


def test_kernels_that_fail_when_they_run_are_taken_out_again(told):
    def failing(graph, inputs):
        def run(*args):
            raise torch.OutOfMemoryError("no room to start")

        return run

    served = engine(toy(), runner(failing))
    assert answers(served, asked(Sampling())) == answers(engine(toy(), Eager), asked(Sampling()))
    assert told == ["OutOfMemoryError: no room to start"]


def test_what_was_not_foreseen_is_not_compiled_later(told):
    counted, model = Counted(), toy()
    pages, how = Pool(model.config, 8, torch.float32).pages, Compiled(counted)
    with how.into(model, pages):
        pass
    found = hidden(model, pages, [Part([5] * 20, Draft(), [0, 1], 0, 0)])
    plain = Pool(model.config, 8, torch.float32).pages
    assert same(found, hidden(toy(), plain, [Part([5] * 20, Draft(), [0, 1], 0, 0)]))
    assert not counted.graphs and told == ["nothing like it was compiled at the start"]


def test_compiling_leaves_the_pool_as_it_was():
    model = toy()
    pages = Pool(model.config, 1, torch.float32, context=PAGE).pages
    pages.data.normal_(generator=torch.Generator().manual_seed(0))
    before = pages.data.clone()
    Eager(model, pages, Compiled(Counted())).warm(4, 2)
    assert torch.equal(pages.data, before)
