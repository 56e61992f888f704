import pytest
import torch
from torch import nn

from satchel.adapt.dora import Decomposed, Dora, _Scale
from satchel.adapt.lora import Lora
from satchel.compress.int8 import Int8
from satchel.compress.nf4 import Nf4
from satchel.core.errors import UserError
from satchel.model.adapters import adapter_parameters, attach
from satchel.model.linear import dense_OI, linears, swap
from tests.adapt.common import check_runs_on_fake_tensors, check_trains_as_peft
from tests.adapt.toys import Toy, stir
from tests.tolerances import TOLERANCE, same

peft = pytest.importorskip("peft")


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def dense_formula(module: Decomposed, base: nn.Module, x: torch.Tensor) -> torch.Tensor:
    tuned = dense_OI(base) + module.scale * module.B_OR @ module.A_RI
    tuned = module.m_O.unsqueeze(1) * tuned / tuned.norm(dim=1, keepdim=True).detach()
    return nn.functional.linear(x, tuned, base.bias)


@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_the_papers_formula(bias):
    base, x = nn.Linear(64, 48, bias=bias).requires_grad_(False), torch.randn(9, 64)
    module = Dora(rank=4).attach("", base, rng())
    stir(module.named_parameters(), 0.3)
    results = []
    for run in (lambda x: module(x, base), lambda x: dense_formula(module, base, x)):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        grads = torch.autograd.grad(y.square().sum(), [leaf, *module.parameters()])
        results.append([y, *grads])
    for ours, plain in zip(*results, strict=True):
        assert same(ours, plain)


@pytest.mark.parametrize("biased", [True, False])
def test_scaling_has_the_gradients_of_its_formula(biased):
    double = {"dtype": torch.float64, "generator": rng()}
    y, h, up = (torch.randn(*shape, **double).requires_grad_() for shape in ((5, 7), (5, 2), (7, 2)))
    gain, bias = torch.randn(7, **double).requires_grad_(), torch.randn(7, **double) if biased else None
    assert torch.autograd.gradcheck(lambda y, *rest: _Scale.apply(y * 1, *rest), (y, h, up, 0.7, gain, bias))


def test_trains_as_pefts_does():
    check_trains_as_peft(Dora(rank=4, alpha=8.0), peft, lora_alpha=8, use_dora=True)


def test_output_at_birth_is_the_bases():
    model, x = Toy(bias=True), torch.randn(3, 5, 64)
    plain = model(x)
    attach(model, Dora(rank=4), rng())
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", [None, Int8(), Nf4()], ids=str)
def test_norm_is_that_of_the_matrix_that_is_never_built(method, dtype):
    base = nn.Linear(128, 48).to(dtype)
    base = method.pack(base.weight.detach()) if method else base
    module = Dora(rank=4).attach("", base, rng())
    stir(module.named_parameters(), 0.3)
    exact = (dense_OI(base).float() + module.product()).norm(dim=1)
    assert torch.allclose(module.norm(base), exact, rtol=TOLERANCE[dtype], atol=0)


def test_only_length_changes_when_only_the_magnitude_does():
    base = nn.Linear(16, 8)
    module = Dora(rank=2).attach("", base, rng())
    with torch.no_grad():
        module.m_O.mul_(2)
    assert same(Dora(rank=2).delta(module, base), base.weight)


@pytest.mark.parametrize("method", [None, Int8(), Nf4()], ids=str)
def test_trains_a_toy_on_any_format(method):
    model, x = Toy(bias=True), torch.randn(64, 64, generator=torch.Generator().manual_seed(5))
    for path, linear in linears(model).items() if method else ():
        swap(model, path, method.pack(linear.weight.detach()))
    attach(model, Dora(rank=4), rng())
    optimizer, losses = torch.optim.Adam([p for _, p in adapter_parameters(model)], lr=1e-2), []
    for _ in range(20):
        loss = (model(x) - x[:, :8].sin()).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_an_adapter_may_stand_around_it_but_not_inside():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    attach(model, Dora(rank=2), rng())
    attach(model, Lora(rank=2), rng(), name="outer")
    stir(adapter_parameters(model))
    model(x).square().sum().backward()
    place = model[0]
    expected = dense_formula(place.adapters["default"], place.base, x) + x @ place.adapters["outer"].product().T
    assert same(model(x), expected)
    with pytest.raises(UserError, match="0 has an adapter already"):
        attach(model, Dora(rank=2), rng(), name="second")


def test_row_of_zeros_stays_finite():
    base = nn.Linear(8, 4, bias=False).requires_grad_(False)
    base.weight[2] = 0
    module = Dora(rank=2).attach("", base, rng())
    module(torch.randn(3, 8), base).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_runs_on_fake_tensors():
    check_runs_on_fake_tensors(Dora(rank=2))
