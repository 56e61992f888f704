import copy

import pytest
import torch
from torch import nn

from satchel.adapt._lowrank import expand, project
from satchel.adapt.lora import Lora
from satchel.core.errors import ModelError, UnknownName, UserError
from satchel.model.adapters import adapted, adapter_parameters, attach, detach
from tests.adapt.common import check_runs_on_fake_tensors, check_trains_as_peft
from tests.adapt.toys import Toy, stir
from tests.tolerances import DEVIATIONS, same

peft = pytest.importorskip("peft")


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_output_at_birth_is_the_bases(dtype):
    model, x = Toy(dtype=dtype), torch.randn(3, 5, 64, dtype=dtype)
    plain = model(x)
    attach(model, Lora(rank=4), rng=rng())
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("alpha", [4.0, 8.0])
def test_trains_as_pefts_does(alpha):
    check_trains_as_peft(Lora(rank=4, alpha=alpha), peft, lora_alpha=alpha)


@pytest.mark.parametrize("x_trains", [True, False])
def test_project_and_expand_have_the_gradients_of_their_formula(x_trains):
    double = {"dtype": torch.float64, "generator": rng()}
    x, weight = torch.randn(5, 6, **double).requires_grad_(x_trains), torch.randn(7, 6, **double)
    down, up = torch.randn(2, 6, **double).requires_grad_(), torch.randn(7, 2, **double).requires_grad_()

    def run(x, down, up):
        through, h = project(x, down)
        assert through.requires_grad == x_trains
        return expand(nn.functional.linear(through, weight), h, up, 0.7)

    assert same(run(x, down, up), x @ (weight + 0.7 * up @ down).T)
    assert torch.autograd.gradcheck(run, (x, down, up))


def test_step_equals_plain_autograd_in_every_gradient():
    model, x = Toy(bias=True), torch.randn(2, 5, 64)
    attach(model, Lora(rank=4, alpha=3), rng=rng())
    stir(adapter_parameters(model))
    plain = copy.deepcopy(model)
    for _, place in adapted(plain):
        place.forward = lambda x, place=place: _plainly(place, x)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for m, leaf in zip((model, plain), inputs, strict=True):
        m(leaf).square().sum().backward()
    assert same(inputs[0].grad, inputs[1].grad)
    for (name, ours), (_, theirs) in zip(adapter_parameters(model), adapter_parameters(plain), strict=True):
        assert same(ours.grad, theirs.grad), name


def _plainly(place, x):
    lora = place.adapters["default"]
    return place.base(x) + lora.scale * (x @ lora.A_RI.T @ lora.B_OR.T)


def test_backward_keeps_the_input_and_a_tensor_of_the_rank_only():
    base, x = nn.Linear(64, 96, bias=False).requires_grad_(False), torch.randn(32, 64, requires_grad=True)
    module = Lora(rank=4).attach("", base, rng())
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module(x, base)
    known = {t.data_ptr() for t in (x, base.weight, module.A_RI, module.B_OR)}
    assert {tuple(t.shape) for t in kept if t.data_ptr() not in known} == {(32, 4)}


def test_adaptation_writes_into_the_bases_output_without_a_copy():
    seen = []
    base = nn.Linear(8, 8).requires_grad_(False)
    module = Lora(rank=2).attach("", base, rng())
    out = module(torch.randn(3, 8, requires_grad=True), lambda x: seen.append(base(x)) or seen[0])
    assert out.data_ptr() == seen[0].data_ptr()


@pytest.mark.parametrize("bias", [True, False])
def test_result_can_be_changed_in_place_by_what_follows(bias):
    model = nn.Sequential(nn.Linear(8, 8, bias=bias))
    attach(model, Lora(rank=2), rng=rng())
    x = torch.randn(2, 3, 8, requires_grad=True)
    model(x).mul_(2).sum().backward()
    assert x.grad is not None


def test_parameters_stay_in_float32_beside_a_bfloat16_base():
    model = Toy(dtype=torch.bfloat16)
    attach(model, Lora(rank=2), rng=rng())
    model(torch.randn(4, 64, dtype=torch.bfloat16)).sum().backward()
    assert {p.dtype for _, p in adapter_parameters(model)} == {torch.float32}
    assert {p.grad.dtype for _, p in adapter_parameters(model)} == {torch.float32}


def test_dropout_acts_while_training_only_and_keeps_the_mean():
    model, x = nn.Sequential(nn.Linear(64, 8)), torch.ones(4000, 64)
    attach(model, Lora(rank=4, dropout=0.5), rng=rng())
    stir(adapter_parameters(model))
    exact = model.eval()(x)
    torch.manual_seed(0)
    dropped = model.train()(x)
    assert not torch.equal(dropped, exact)
    deviation = dropped.std(0) / len(x) ** 0.5
    assert ((dropped.mean(0) - exact.mean(0)).abs() < DEVIATIONS * deviation).all()


def test_base_is_frozen_while_attached_and_trains_as_before_after_detach():
    model, x = Toy(), torch.randn(4, 64)
    model.layers[0].up_proj.weight.requires_grad_(False)
    before, state, trains = dict(model.named_modules()), copy.deepcopy(model.state_dict()), _trains(model)
    attach(model, Lora(rank=2), rng=rng())
    attach(model, Lora(rank=3), targets=("up_proj",), rng=rng(), name="second")
    optimizer = torch.optim.SGD([p for _, p in adapter_parameters(model)], lr=0.1)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for _, p in adapter_parameters(model)}
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
    detach(model)
    assert dict(model.named_modules()) == before and _trains(model) == trains
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def _trains(model):
    return {name: p.requires_grad for name, p in model.named_parameters()}


def test_two_adapters_add_up():
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    attach(model, Lora(rank=2), rng=rng(), name="a")
    attach(model, Lora(rank=3), rng=rng(), name="b")
    stir(adapter_parameters(model))
    base, (a, b) = model[0].base, model[0].adapters.values()
    assert same(model(x), base(x) + x @ (a.product() + b.product()).T)


def test_same_seed_gives_the_same_adapter():
    models = [Toy(), Toy()]
    for model in models:
        attach(model, Lora(rank=2), rng=rng())
    pairs = zip(adapter_parameters(models[0]), adapter_parameters(models[1]), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)


def test_runs_on_fake_tensors():
    check_runs_on_fake_tensors(Lora(rank=2))


@pytest.mark.parametrize(
    "knobs", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"alpha": 0.0}], ids=lambda k: next(iter(k))
)
def test_senseless_knobs_are_refused_by_name(knobs):
    with pytest.raises(UserError, match=f"lora: {next(iter(knobs))}="):
        Lora(**knobs)


def test_attaching_twice_or_to_nothing_is_refused_and_changes_nothing():
    model = Toy()
    with pytest.raises(UnknownName, match="did you mean 'up_proj'"):
        attach(model, Lora(targets=("upproj",)))
    with pytest.raises(UserError, match="no linear map"):
        attach(nn.Sequential(nn.ReLU()), Lora())
    assert all(p.requires_grad for p in model.parameters())
    attach(model, Lora())
    with pytest.raises(ModelError, match="attached already"):
        attach(model, Lora())
