"""What every optimizer here has to do, whatever its formula."""

import copy

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from satchel.optim._shared import join

LR = 1e-2
SHAPES = {
    "model.embed_tokens.weight": (50, 32),
    "model.layers.0.self_attn.q_proj.weight": (96, 64),
    "model.layers.0.mlp.down_proj.weight": (64, 160),
    "model.layers.0.mlp.down_proj.bias": (64,),
    "model.norm.weight": (32,),
}


def parameters(dtype=torch.float32, seed=0, shapes=None):
    rng = torch.Generator().manual_seed(seed)
    pairs = (shapes or SHAPES).items()
    return [(n, nn.Parameter(torch.randn(s, generator=rng).mul_(0.1).to(dtype))) for n, s in pairs]


def give_gradients(named, step):
    """Gradients of decaying spectrum that differ from step to step, in each parameter's dtype."""
    rng = torch.Generator().manual_seed(1000 + step)
    for _, p in named:
        g = torch.randn(p.shape, generator=rng)
        p.grad = (g * (1 / (1 + torch.arange(g.shape[-1])))).to(p.dtype)


def run(optimizer, named, steps):
    for step in steps:
        give_gradients(named, step)
        optimizer.step()
    return [p.detach().clone() for _, p in named]


def state_bytes(optimizer):
    """Bytes of all tensors of the state."""
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def plain(value):
    """Whether a checkpoint can hold the value as JSON."""
    if isinstance(value, dict):
        return all(isinstance(k, str | int) and plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def check_resume_is_bit_identical(method, dtype):
    """5 steps, a state dict that holds only plain tensors and JSON, and 5 more: the same bits as 10 steps."""
    named = parameters(dtype)
    whole = run(method.build(named, LR, 3), named, range(10))
    named = parameters(dtype)
    first = method.build(named, LR, 3)
    run(first, named, range(5))
    saved = copy.deepcopy(first.state_dict())
    for state in saved["state"].values():
        assert all(type(v) is torch.Tensor or plain(v) for v in state.values())
    assert plain(saved["param_groups"])
    second = method.build(named, LR * 7, 99)
    second.load_state_dict(saved)
    for ours, want in zip(run(second, named, range(5, 10)), whole, strict=True):
        assert torch.equal(ours, want)


def check_exact_rounding_follows_the_float32_master(method, on_master, steps=10, lr=1e-4):
    """bf16 weights with kept low bits are, at every step, the rounded trajectory of fp32 weights, bit for bit."""
    ours, master = parameters(torch.bfloat16), parameters(torch.bfloat16)
    master = [(name, nn.Parameter(p.detach().float())) for name, p in master]
    optimizer, reference = method.build(ours, lr, 0), on_master.build(master, lr, 0)
    for step in range(steps):
        give_gradients(ours, step)
        for (_, p), (_, q) in zip(ours, master, strict=True):
            q.grad = p.grad.float()
        optimizer.step()
        reference.step()
        for (_, p), (_, q) in zip(ours, master, strict=True):
            assert torch.equal(join(p.detach().view(-1), optimizer.state[p]["low"]), q.detach().view(-1))


def check_fake_tensors_give_the_same_state(method, dtype):
    """Two steps on fake tensors leave the state that two real ones do: names, shapes, dtypes."""
    named = parameters(dtype)
    real = method.build(named, LR, 0)
    run(real, named, range(2))
    with FakeTensorMode():
        fake_named = [(n, nn.Parameter(torch.empty(p.shape, dtype=p.dtype))) for n, p in named]
        fake = method.build(fake_named, LR, 0)
        for _ in range(2):
            for _, p in fake_named:
                p.grad = torch.empty_like(p)
            fake.step()
    describe = lambda o: [  # noqa: E731
        {k: (v.shape, v.dtype) if isinstance(v, torch.Tensor) else v for k, v in state.items()}
        for state in o.state.values()
    ]
    assert describe(fake) == describe(real)


def check_temporaries_are_bounded(method, limit_bytes, dtype=torch.bfloat16, shape=(1024, 768)):
    """A second step on one large matrix allocates at most `limit_bytes` beyond what it keeps, a byte for proof."""
    named = parameters(dtype, shapes={"model.layers.0.mlp.up_proj.weight": shape})
    optimizer = method.build(named, LR, 0)
    run(optimizer, named, range(1))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        torch.empty(1, dtype=torch.uint8)
        optimizer.step()
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak <= limit_bytes
