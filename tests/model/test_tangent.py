"""Forward mode through the decoder: the tangent of the loss is the gradient's part along the tangents."""

import pytest
import torch
from torch.autograd import forward_ad

from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.functional import chunked_cross_entropy
from satchel.model.tangent import tangents_flow
from tests.model.families import CASES

SLOPE = 1e-4
FAMILIES = ("llama", "mistral-sliding", "qwen3", "gemma2", "gpt2", "opt", "olmo2", "olmoe")


def decoder(case):
    kind, fields = CASES[case]
    made = Decoder(ModelConfig.from_hf({"model_type": kind, "rms_norm_eps": 1e-5} | fields))
    made.init_weights(torch.Generator().manual_seed(0), std=0.2)
    return made


def loss_of(model, lengths=(13, 20)):
    tokens_1N = torch.randint(0, 100, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    targets_N = tokens_1N[0].roll(-1).index_fill(0, torch.tensor([12, 32]), -100)
    x_ND = model.hidden(tokens_1N, lengths=lengths)[0]
    return chunked_cross_entropy(x_ND, model.lm_head.weight, targets_N, chunk=8, softcap=model.config.logit_softcap)


@pytest.mark.parametrize("case", FAMILIES)
def test_the_losss_tangent_is_gradient_dot_direction(case):
    model = decoder(case)
    plain = loss_of(model)
    plain.backward()
    rng = torch.Generator().manual_seed(2)
    found = [(p, torch.randn(p.shape, generator=rng)) for p in model.parameters()]
    with torch.no_grad(), forward_ad.dual_level():
        for p, z in found:
            p.copy_(forward_ad.make_dual(p.detach(), z))
        value, tangent = forward_ad.unpack_dual(loss_of(model))
    assert float(value) == pytest.approx(float(plain.detach()), rel=SLOPE)
    slope = sum((p.grad * z).sum() for p, z in found if p.grad is not None)
    assert float(tangent) == pytest.approx(float(slope), rel=SLOPE)


@pytest.mark.parametrize("how", [{"scale": 0.7}, {"softcap": 3.0}, {"bias": torch.linspace(-1, 1, 50)}])
def test_the_cross_entropy_has_the_same_value_in_forward_mode(how):
    rng = torch.Generator().manual_seed(0)
    x_ND, weight_VD = torch.randn(40, 12, generator=rng), torch.randn(50, 12, generator=rng)
    targets_N = torch.randint(0, 50, (40,), generator=rng)
    targets_N[::3] = -100
    with torch.no_grad():
        plain = chunked_cross_entropy(x_ND, weight_VD, targets_N, chunk=16, **how)
        with forward_ad.dual_level():
            assert tangents_flow()
            forward = chunked_cross_entropy(x_ND, weight_VD, targets_N, chunk=16, **how)
    assert not tangents_flow()
    torch.testing.assert_close(forward, plain)
