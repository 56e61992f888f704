"""On a CUDA device: a job's rehearsed peak is the allocator's, its limit holds, and its losses are the CPU's; compiled
and recorded steps of an engine say what eager ones and the CPU do, in the memory that was set aside."""

from functools import partial

import pytest
import torch

from satchel.core.job import TuneJob
from satchel.core.request import Request
from satchel.core.serve import ServeJob
from satchel.core.serve_seams import Draft
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.forward import Part
from satchel.run.capacity import recordings_bytes
from satchel.run.compiled import Compiled
from satchel.run.engine import Engine
from satchel.run.governor import Governor
from satchel.run.graphs import Eager, runner
from satchel.run.rehearse import rehearse
from satchel.run.scheduler import Limits
from satchel.run.step import train_step
from satchel.run.warm import MINIATURE, real
from tests.tolerances import same

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
MEMO, LEMO = {"activations": "memo:alpha=0.5"}, {"activations": "lemo"}
CONFIG = ModelConfig.from_hf(MINIATURE | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6})


@pytest.mark.parametrize("changes", [{}, {"adapter": "none"}, {"activations": "full"}, MEMO, LEMO])
def test_the_peak_is_the_allocators_within_two_percent(changes: dict) -> None:
    job = TuneJob(model="toy", data="toy", context=256, batch=4, **changes)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    assembly, batch = real(job, CONFIG, "cuda", (256,) * 4)
    for _ in range(2):
        train_step(assembly, [batch], 1e-3)
    measured = torch.cuda.max_memory_allocated() - before
    assert rehearse(job, CONFIG, device="cuda").peak.peak_bytes == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("changes", [{}, MEMO, {"activations": "memo:alpha=1"}])
def test_losses_are_the_cpus(changes: dict) -> None:
    job = TuneJob(model="toy", data="toy", context=256, batch=2, dtype="fp32", **changes)
    losses = {}
    for device in ("cpu", "cuda"):
        assembly, batch = real(job, CONFIG, device, (256, 200, 56))
        losses[device] = [float(train_step(assembly, [batch], 1e-3)["loss"]) for _ in range(3)]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


def test_the_limit_holds() -> None:
    governor = Governor("cuda", torch.cuda.memory_reserved() + (256 << 20))
    governor.begin()
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    finally:
        governor.end()


@pytest.mark.parametrize("ring_mib", [1, 64])
def test_what_is_copied_from_it_while_a_step_computes_is_what_was_saved(ring_mib: int) -> None:
    job = TuneJob(model="toy", data="toy", context=256, batch=4, checkpoint=f"datastates:ring_mib={ring_mib}")
    assembly, batch = real(job.replace(adapter="none"), CONFIG, "cuda", (256,) * 4)
    train_step(assembly, [batch], 1e-3)
    tensors = {name: parameter.detach() for name, parameter in assembly.parameters}
    before, found = {name: tensor.cpu() for name, tensor in tensors.items()}, {}

    def write(streams) -> None:
        found.update({name: b"".join(map(bytes, stream)) for name, stream in streams.items()})

    assembly.saver.save({"all": tensors}, write)
    train_step(assembly, [batch], 1e-3)
    assembly.saver.finish()
    assert found["all"] == b"".join(bytes(t.contiguous().view(-1).view(torch.uint8).numpy()) for t in before.values())
    assert not all(torch.equal(tensor.cpu(), before[name]) for name, tensor in tensors.items())


def serving(device: str, how, dtype=torch.float32, decoding: str = "plain", **limits) -> Engine:
    model = Decoder(CONFIG, dtype)
    model.init_weights(torch.Generator().manual_seed(0), std=0.1)
    sizes = {"blocks": 100, "batch": 8, "step_tokens": 128, "context": 512} | limits
    engine = Engine(model.to(device), Limits(**sizes), decoding=decoding, runner=how)
    engine.warm()
    return engine


def said(engine: Engine) -> dict[int, list[int]]:
    """What it answers to prompts of many lengths, one of which repeats itself."""
    prompts = [(5 + i,) * (1 + 23 * i) for i in range(8)] + [(5, 9, 17, 33) * 20]
    for number, prompt in enumerate(prompts):
        engine.submit(Request(prompt=prompt, max_tokens=10 + 6 * number))
    tokens: dict[int, list[int]] = {}
    for event in engine.run():
        tokens.setdefault(event.id, []).extend(event.tokens)
    engine.check_integrity()
    return tokens


@pytest.mark.parametrize("decoding", ["plain", "lookup:tokens=5"])
@pytest.mark.parametrize("limits", [{}, {"blocks": 20}])
def test_recorded_steps_say_what_eager_ones_and_the_cpu_say(decoding: str, limits: dict) -> None:
    recorded = serving("cuda", runner("cuda", 2 << 30), decoding=decoding, **limits)
    answers = said(recorded)
    assert answers == said(serving("cuda", Eager, decoding=decoding, **limits))
    assert answers == said(serving("cpu", Eager, **limits))
    stats = recorded.stats()
    assert stats["replayed"] > stats["steps"] / 2
    assert stats["preemptions"] > 0 or not limits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_operators_say_what_eager_ones_do_and_none_is_compiled_in_a_step(dtype: torch.dtype) -> None:
    ours, theirs = serving("cuda", partial(Eager, compiled=Compiled()), dtype), serving("cuda", Eager, dtype)
    compiled = ours.runner.compiled
    assert compiled is not None and not compiled.told
    graphs = compiled.graphs
    for tokens in (1, 2, 5, 64, 100, 300):
        parts = [Part([5 + tokens] * tokens, Draft((1, 2, 3), (-1, -1, 0)), list(range(30)), 0, 0)]
        assert same(ours.runner.hidden(parts)[: tokens + 3], theirs.runner.hidden(parts)[: tokens + 3])
    assert said(ours) == said(theirs) or dtype != torch.float32
    assert 0 < graphs == compiled.graphs and not compiled.told


def test_a_recorded_step_gives_the_same_bits_each_time() -> None:
    how = runner("cuda", 2 << 30)
    first, second = (said(serving("cuda", how, torch.bfloat16)) for _ in range(2))
    assert first == second


def test_recordings_stay_within_the_memory_that_is_set_aside() -> None:
    job = ServeJob(model="toy", batch=8, context=512, step_tokens=128)
    room = recordings_bytes(job, CONFIG, "cuda")
    said(serving("cuda", Eager, torch.bfloat16))  # what libraries keep for good
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    engine = serving("cuda", runner("cuda", room), torch.bfloat16)
    weights = sum(p.nbytes for p in engine.model.parameters()) + engine.pool.data.nbytes
    torch.cuda.empty_cache()
    assert before - torch.cuda.mem_get_info()[0] <= weights + room + (64 << 20)  # segments of the allocator, libraries
    assert engine.runner.recordings


def test_where_there_is_no_room_steps_run_eagerly() -> None:
    engine = serving("cuda", runner("cuda", 0))
    assert said(engine) == said(serving("cuda", Eager))
    assert len(engine.runner.recordings) <= 1
