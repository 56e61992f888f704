"""Steps that are recorded and run again say what eager ones do, and nothing in them waits for a number."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from satchel.core.request import Request, Sampling
from satchel.core.serve import ServeJob
from satchel.core.serve_seams import Draft
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.forward import Part, hidden
from satchel.model.linear import swap
from satchel.model.paged import Pool
from satchel.run import capacity as room
from satchel.run.capacity import rehearse_engine as on_cpu
from satchel.run.engine import Engine
from satchel.run.graphs import GRAPH_BYTES, Eager, Recorded, sizes
from satchel.run.scheduler import Limits
from tests.model.families import CASES
from tests.run.served import LLAMA
from tests.run.test_adapters import write_adapter
from tests.run.test_engine import Chars, answers, prompts
from tests.run.toys import toy_decoder
from tests.tolerances import same

SAMPLINGS = [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=5)]
REPEATED = (5, 9, 17, 33) * 9


class Again:
    """Stands in for a graph: runs the function again, into the tensor that it gave the first time."""

    full = False

    def __call__(self, run):
        out = run()
        return lambda: out.copy_(run()), out


class Never(Again):
    """Stands in for a model that waits for a number."""

    def __call__(self, run):
        run()
        raise RuntimeError("called a synchronizing operation")


def recorded(model, pages):
    return Recorded(model, pages, Again())


def engine(model, runner=recorded, decoding="plain", **limits):
    limits = Limits(**({"blocks": 64, "batch": 8, "step_tokens": 64, "context": 256} | limits))
    served = Engine(model, limits, Chars(), decoding=decoding, runner=runner)
    served.pool.data.fill_(torch.nan)
    served.warm()
    return served


def asked(how, longest=40):
    lines = [*prompts(9, longest=longest), REPEATED, REPEATED[:19]]
    return [Request(prompt=line, max_tokens=5 + i * 4, sampling=how) for i, line in enumerate(lines)]


@pytest.fixture(scope="module")
def model():
    return toy_decoder()


@pytest.mark.parametrize("how", SAMPLINGS)
@pytest.mark.parametrize("decoding", ["plain", "lookup:tokens=5"])
@pytest.mark.parametrize("limits", [{}, {"blocks": 12}, {"batch": 3, "step_tokens": 9, "blocks": 6, "context": 90}])
def test_answers_are_those_of_eager_steps_in_any_company(model, how, decoding, limits):
    served, requests = engine(model, decoding=decoding, **limits), asked(how)
    assert answers(served, requests) == answers(engine(model, Eager, **limits), requests)
    stats = served.stats()
    assert stats["replayed"] > stats["steps"] / 3
    assert stats["preemptions"] > 0 or "blocks" not in limits
    assert stats["guessed"] > 0 or decoding == "plain"


def test_a_sequence_longer_than_the_shortest_recorded_one_has_a_recording_of_its_own(model):
    request = Request(prompt=prompts(1)[0], max_tokens=300)
    served = engine(model, context=400)
    assert answers(served, [request]) == answers(engine(model, Eager, context=400), [request])
    assert served.stats()["replayed"] == served.stats()["steps"] - 1  # all but the prompt's


def test_adapters_on_a_row_run_eagerly_and_registering_them_ends_no_recording(tmp_path):
    folder = write_adapter(tmp_path / "poet", 4, 1)
    requests = [Request(prompt=(9, 8, 7), max_tokens=8, adapter=name) for name in ("poet", None)]
    said = {}
    for runner in (recorded, Eager):
        served = engine(toy_decoder(), runner)
        served.register("poet", folder)
        said[runner] = []
        for request in requests:
            served.submit(request)
            said[runner].append([event.tokens for event in served.run()])
            assert (served.stats()["replayed"] > 0) == (runner is recorded and request.adapter is None)
    assert said[recorded] == said[Eager]
    assert said[Eager][0] != said[Eager][1]


def test_a_swapped_module_ends_recordings_until_they_are_made_again():
    swapped, request = toy_decoder(), Request(prompt=(9, 8, 7), max_tokens=8)
    served = engine(swapped)
    before = answers(served, [request])
    other = nn.Linear(32, 48, bias=False).requires_grad_(False)
    other.weight.normal_(0, 2, generator=torch.Generator().manual_seed(0))
    swap(swapped, "model.layers.1.mlp.up_proj", other)
    replayed = served.stats()["replayed"]
    after = answers(served, [request])
    assert after == answers(engine(swapped, Eager), [request]) != before
    assert served.stats()["replayed"] == replayed and not served.runner.recordings
    served.warm()
    assert answers(served, [request]) == after and served.stats()["replayed"] > replayed


def test_a_hook_is_called_in_every_step():
    hooked, calls = toy_decoder(), []
    served = engine(hooked)
    handle = hooked.layers[1].register_forward_hook(lambda *_: calls.append(1))
    answers(served, [Request(prompt=(9, 8, 7), max_tokens=8)])
    assert len(calls) == served.stats()["steps"] and not served.stats()["replayed"]
    handle.remove()
    answers(served, [Request(prompt=(9, 8, 7), max_tokens=8)])
    assert served.stats()["replayed"]


def test_what_cannot_be_recorded_runs_eagerly(model):
    served = engine(model, lambda model, pages: Recorded(model, pages, Never()))
    assert answers(served, asked(Sampling())) == answers(engine(model, Eager), asked(Sampling()))
    assert not served.stats()["replayed"] and not served.runner.recordings


def test_recording_leaves_the_pool_as_it_was(model):
    pool = Pool(model.config, 5, torch.float32)
    pool.data.normal_(generator=torch.Generator().manual_seed(0))
    before = pool.data.clone()
    recorded(model, pool.pages).warm(4, 2)
    assert torch.equal(pool.data, before)


def test_recordings_end_where_memory_does(model):
    class Two(Again):
        made = 0

        def __call__(self, run):
            self.made += 1
            return super().__call__(run)

        @property
        def full(self):
            return self.made == 2

    runner = Recorded(model, Pool(model.config, 4, torch.float32).pages, Two())
    runner.warm(8, 0)
    assert [shape.rows for shape in runner.recordings] == [8, 1]


def test_tables_that_the_pool_could_not_fill_are_not_recorded(model):
    runner = recorded(model, Pool(model.config, 40, torch.float32).pages)
    runner.warm(3, 0)
    found = {(shape.rows, shape.groups[0].pages[0]) for shape in runner.recordings}
    assert found == {(1, 16), (2, 16), (3, 16), (1, 32), (2, 32)}


def test_sizes_are_four_to_an_octave_and_tables_one():
    rows, sequences, pages = sizes(2048, 32, 4)
    assert rows == [1, 5] and pages == [16, 32, 64, 128]
    assert sequences == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]


class OnDevice(TorchDispatchMode):
    """Refuses operators that read or write on two devices: such a copy waits, and cannot be recorded."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        found = {t.device.type for t in tensors}
        assert len(found) < 2, f"{func} meets {found}"
        return out


def elsewhere(family, blocks=8):
    """On a device without numbers: what asks for one fails. (Fake CUDA tensors cannot be indexed without CUDA.)"""
    name, changes = CASES[family]
    config = ModelConfig.from_hf(changes | {"model_type": name})
    model = Decoder(config, torch.bfloat16, "meta").eval()
    return model, Pool(config, blocks, torch.bfloat16, "meta")


SEEN = ["llama", "llama-3.1", "llama-yarn", "llama-dynamic", "mistral-sliding", "qwen3", "gemma2", "gpt2", "opt"]


@pytest.mark.parametrize("family", SEEN)
def test_a_recorded_step_stays_on_the_device_and_waits_for_no_number(family, monkeypatch):
    class Checked(Again):
        def __call__(self, run):
            with OnDevice(), monkeypatch.context() as patch:
                patch.setattr(torch, "tensor", None)  # copies from the host, unseen by modes
                patch.setattr(torch, "as_tensor", None)
                return run, run()

    model, pool = elsewhere(family)
    runner = Recorded(model, pool.pages, Checked())
    runner.warm(3, 4)
    assert len(runner.recordings) == 2 * 3 * len(sizes(model.config.context, 3, 4)[2])


def test_a_wait_in_a_step_would_be_found():
    x = torch.zeros(3, device="meta")
    for wait in (lambda: x.sum().item(), lambda: x.tolist(), x.nonzero, lambda: x[x > 0], lambda: bool(x.any())):
        with pytest.raises((RuntimeError, NotImplementedError)):
            wait()
    with OnDevice(), pytest.raises(AssertionError, match="meets"):
        x.copy_(torch.zeros(3))


@pytest.mark.parametrize("family", SEEN)
def test_any_step_waits_for_no_number(family):
    parts = [Part([0] * 20, Draft(), [0, 3], 0, 0), Part([0], Draft((1, 2), (-1, -1)), [2], 5, 20)]
    model, pool = elsewhere(family)
    x_ND = hidden(model, pool.pages, [*parts, Part([0], Draft(), [1, 4], 16, 23)])
    assert x_ND.is_meta and x_ND.shape == (24, model.config.width)


def test_recordings_have_their_place_in_the_budget(monkeypatch):
    """Rehearsed where there are numbers to index; the pool's pages are copied to be read, as on a GPU."""
    monkeypatch.setattr("satchel.native.paged.library", lambda: None)
    monkeypatch.setattr(room, "rehearse_engine", lambda job, config, device, *rest: on_cpu(job, config, "cpu", *rest))
    monkeypatch.setattr(room, "process_bytes", lambda *_: 0)
    config, job = ModelConfig.from_hf(LLAMA), ServeJob(model="x", memory="8GiB", context=1024, batch=4)
    with_graphs, without = (room.capacity(job, config, device) for device in ("cuda", "cpu"))
    assert room.GRAPHS not in without.accounts
    least = GRAPH_BYTES * 4 * len(sizes(1024, 4, 0)[2])
    assert with_graphs.accounts[room.GRAPHS] > least + config.width * 4
    assert sum(with_graphs.accounts.values()) <= with_graphs.budget_bytes
    longer = room.recordings_bytes(job.replace(batch=32), config, "cuda")
    assert longer > with_graphs.accounts[room.GRAPHS]


@pytest.mark.parametrize("tokens", [[300], [1, 1, 1], [5, 200, 1, 70]])
@torch.no_grad()
def test_attention_in_torch_is_the_kernels_within_whole_models(model, tokens, monkeypatch):
    """Rows of many pages, looked at a few at a time."""
    monkeypatch.setattr("satchel.model.spans.BUDGET", 4096)
    parts, first = [], 0
    for number, count in enumerate(tokens):
        table = list(range(40 * number, 40 * number + 40))
        parts.append(Part([7 + number] * count, Draft(), table, 200, first))
        first += count
    found = []
    for native in (True, False):
        pool = Pool(model.config, 200, torch.float32)
        pool.data.normal_(generator=torch.Generator().manual_seed(0))
        with monkeypatch.context() as patch:
            if not native:
                patch.setattr("satchel.native.paged.library", lambda: None)
            found.append((hidden(model, pool.pages, parts)[:first], pool.data))
    assert same(found[1][0], found[0][0])
    assert same(found[1][1], found[0][1])
