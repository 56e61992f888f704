"""On a CUDA device: a job's rehearsed peak is the allocator's, its limit holds, and its losses are the CPU's."""

import pytest
import torch

from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.run.governor import Governor
from satchel.run.rehearse import rehearse
from satchel.run.step import train_step
from satchel.run.warm import MINIATURE, real

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
