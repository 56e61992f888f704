import pytest
import torch
from torch import nn

from satchel.adapt.lora import Lora
from satchel.adapt.rslora import RsLora
from satchel.model.adapters import attach
from tests.adapt.common import check_trains_as_peft

peft = pytest.importorskip("peft")


def test_trains_as_pefts_does():
    check_trains_as_peft(RsLora(rank=4, alpha=8.0), peft, lora_alpha=8, use_rslora=True)


def learnt(method, draws=40):
    """How far one step of SGD on B moves the output, on average: the paper's measure of learning."""
    rng, moved = torch.Generator().manual_seed(1), 0.0
    for _ in range(draws):
        model, x_1I = nn.Sequential(nn.Linear(64, 64)), torch.randn(1, 64, generator=rng)
        attach(model, method, rng)
        before_1O, up_OR = model(x_1I), model[0].adapters["default"].B_OR
        before_1O.sum().backward()
        with torch.no_grad():
            up_OR -= up_OR.grad
            moved += (model(x_1I) - before_1O).norm().item() / draws
    return moved


def test_a_step_teaches_as_much_at_any_rank_where_lora_learns_less_and_less():
    """Theorem 3.2 of the paper: the scale must fall as 1 / sqrt(rank), no faster and no slower."""
    stable, plain = ([learnt(kind(rank=rank)) for rank in (16, 256, 4096)] for kind in (RsLora, Lora))
    assert max(stable) < 1.1 * min(stable)
    assert plain[0] > 12 * plain[1] > 144 * plain[2]


def test_rank_one_is_lora():
    assert RsLora(rank=1).scale == Lora(rank=1).scale
