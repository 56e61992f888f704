"""What every adapter is held to; PEFT stands beside it."""

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from satchel.model.adapters import Adapted, adapted, adapter_parameters, attach
from tests.adapt.toys import Toy, stir, tiny_llama
from tests.tolerances import same

TOKENS = torch.arange(24).view(2, 12) * 7 % 97


def logits(model: nn.Module) -> torch.Tensor:
    """Of the toy tokens, in evaluation mode."""
    with torch.no_grad():
        out = model.eval()(TOKENS)
    return getattr(out, "logits", out)


def check_trains_as_peft(method, peft, **knobs):
    """From the same values, five steps of SGD: PEFT's gradients at every step, PEFT's logits after them."""
    targets = ("q_proj", "down_proj")
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=method.rank, target_modules=list(targets), **knobs))
    ours = tiny_llama()
    attach(ours, method, targets=targets)
    twins = {path: theirs.get_submodule(f"base_model.model.{path}") for path, _ in adapted(ours)}
    pairs = [pair for path, place in adapted(ours) for pair in _pairs(place, twins[path])]
    stir((("", q) for _, q in pairs), 0.3)
    with torch.no_grad():
        for p, q in pairs:
            p.copy_(q)
    for _ in range(5):
        for model in (ours, theirs):
            model.train()(TOKENS, labels=TOKENS).loss.backward()
        for p, q in pairs:
            assert same(p.grad, q.grad)
            for parameter in (p, q):
                parameter.data.sub_(parameter.grad, alpha=0.1)
                parameter.grad = None
    assert same(logits(ours), logits(theirs))


def check_runs_on_fake_tensors(method):
    """Attached, run and differentiated without a byte of memory."""
    with FakeTensorMode():
        model = Toy(dtype=torch.bfloat16)
        attach(model, method)
        model(torch.empty(2, 3, 64, dtype=torch.bfloat16)).sum().backward()
        assert all(p.grad.shape == p.shape for _, p in adapter_parameters(model))


def _pairs(place: Adapted, theirs: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Our parameters of one map beside PEFT's."""
    ours = place.adapters["default"]
    pairs = [(ours.A_RI, theirs.lora_A["default"].weight), (ours.B_OR, theirs.lora_B["default"].weight)]
    return [*pairs, (ours.m_O, theirs.lora_magnitude_vector["default"].weight)] if hasattr(ours, "m_O") else pairs
