"""OwLore draws layers by their outliers, and trains those that it draws as GaLore does."""

import itertools

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from satchel.core.errors import UserError
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.optim.adamw import AdamW
from satchel.optim.galore import GaLore
from satchel.optim.owlore import OwLore, inputs_of, outlier_share
from satchel.run.step import StepLoss, take_step
from tests.optim import common
from tests.optim.test_lisa import JOBS, LAYERS, assembled, layer_of, watched
from tests.run.toys import toy_decoder
from tests.tolerances import TOLERANCE

EXACT = TOLERANCE[torch.float32]
OWL = "owlore:rank=8,gap=4,gamma=2,period=2,threshold=3"


def brute_force(decoder, batches, threshold):
    """Every layer's mean share of outliers, from the inputs of its maps as a hook a map keeps them."""
    maps = {name: m for name, m in decoder.named_modules() if isinstance(m, nn.Linear) and layer_of(f"{name}.weight")}
    maps |= {name: m for name, m in decoder.named_modules() if ".layers.0." in name and isinstance(m, nn.Linear)}
    seen = {name: [] for name in maps}
    hooks = [m.register_forward_hook(lambda m, x, y, n=n: seen[n].append(x[0].flatten(0, -2))) for n, m in maps.items()]
    with torch.no_grad():
        for batch in batches:
            decoder.hidden(batch.tokens_1N, lengths=batch.lengths)
    for hook in hooks:
        hook.remove()
    shares = [[] for _ in decoder.layers]
    for name, m in maps.items():
        a_OI = m.weight.detach().abs() * torch.cat(seen[name]).norm(dim=0)
        shares[layer_of(f"{name}.weight")].append((a_OI > threshold * a_OI.mean()).float().mean().item())
    return [sum(found) / len(found) for found in shares]


@pytest.mark.parametrize(("mode", "changes"), [("owl", {"micro_batch": 2, "activations": "full"}), ("owl-reverse", {})])
def test_layers_are_weighed_by_the_outliers_of_the_first_steps_inputs(tmp_path, mode, changes):
    assembly, micro_batches = assembled(tmp_path, f"{OWL},mode={mode}", **changes)
    with torch.no_grad():  # outliers of its own for each layer
        for index, block in enumerate(assembly.model.layers):
            block.mlp.up_proj.weight[:, : index + 1] *= 8
    want = brute_force(assembly.model, micro_batches(0), 3.0)
    take_step(StepLoss(assembly, lambda: micro_batches(0)), assembly.lr)
    want = [max(want) - share for share in want] if mode == "owl-reverse" else want
    assert assembly.optimizer.param_groups[0]["weights"] == pytest.approx(want, rel=EXACT)
    assert len(set(want)) == LAYERS
    take_step(StepLoss(assembly, lambda: micro_batches(1)), assembly.lr)
    assert assembly.optimizer.param_groups[0]["weights"] == pytest.approx(want, rel=EXACT)


def test_the_share_of_outliers_is_counted_in_parts_as_in_one():
    rng = torch.Generator().manual_seed(0)
    w_OI, norm_I = torch.randn(3000, 700, generator=rng) ** 3, torch.rand(700, generator=rng)
    for dtype in (torch.float32, torch.bfloat16):
        a_OI = w_OI.to(dtype).abs() * norm_I
        want = (a_OI > 13 * a_OI.mean()).double().mean().item()
        assert outlier_share(w_OI.to(dtype), norm_I, 13.0) == pytest.approx(want, abs=2 / a_OI.numel())
        assert want > 1e-3


def test_inputs_are_those_of_all_calls_and_hooks_are_gone_afterwards():
    first, second = nn.Linear(5, 3), nn.Linear(3, 2)
    x_BTI = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    with inputs_of([first.weight]) as square:
        second(first(x_BTI))
        first(2 * x_BTI)
    first(x_BTI)
    assert square.keys() == {id(first.weight)}
    want_I = 5 * x_BTI.flatten(0, 1).square().sum(0)
    torch.testing.assert_close(square[id(first.weight)], want_I, rtol=EXACT, atol=EXACT)


def test_weight_norms_weigh_layers_without_any_data():
    decoder = toy_decoder(layers=LAYERS)
    optimizer = OwLore(rank=8, mode="weight-norm").build(list(decoder.named_parameters()), common.LR, 0)
    norms = [[p.norm().item() for p in block.parameters() if p.ndim == 2] for block in decoder.layers]
    want = [sum(found) / len(found) for found in norms]
    assert optimizer.param_groups[0]["weights"] == pytest.approx(want, rel=EXACT)


@pytest.mark.parametrize("mode", ["owl", "uniform,layerwise=true", "weight-norm"])
def test_only_the_drawn_layers_and_what_is_outside_train(tmp_path, mode):
    assembly, micro_batches = assembled(tmp_path, f"{OWL},mode={mode}", **JOBS[3])
    seen, drawn = watched(assembly, micro_batches, 8), set()
    before = seen[0][-1]
    for trains, _, kept, after in seen[1:]:  # the first draws again once it has looked
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        layers = {layer_of(name) for name in trains} - {None}
        assert len(layers) == 2 and kept <= trains and moved <= trains
        assert {layer_of(name) for name in moved} == {None} | layers
        drawn.add(tuple(sorted(layers)))
        before = after
    assert len(drawn) > 1


def test_drawn_layers_train_as_under_galore_torch():
    """Twenty steps of the only layer; what is not projected takes AdamW."""
    galore_torch = pytest.importorskip("galore_torch")
    method = OwLore(rank=8, gap=5, subspace="exact", gamma=1)
    ours, theirs, plain = (common.parameters() for _ in range(3))
    low = {"rank": 8, "update_proj_gap": 5, "scale": 1.0, "proj_type": "std"}
    groups = [low | {"params": [p for name, p in theirs if method.projects(name, p)]}]
    reference = galore_torch.GaLoreAdamW(groups, lr=common.LR, eps=1e-8, no_deprecation_warning=True)
    got, projected = (
        common.run(method.build(ours, common.LR, 0), ours, range(20)),
        common.run(reference, theirs, range(20)),
    )
    adamw = common.run(AdamW().build(plain, common.LR, 0), plain, range(20))
    for (name, p), value, want, other in zip(ours, got, projected, adamw, strict=True):
        torch.testing.assert_close(value, want if method.projects(name, p) else other, rtol=0, atol=1e-5)


def test_all_layers_at_once_is_galore_bit_for_bit(tmp_path):
    found = []
    for optimizer in ("galore:rank=8,gap=4,scale=1", f"{OWL},gamma={LAYERS}".replace("gamma=2,", "")):
        found.append([after for *_, after in watched(*assembled(tmp_path, optimizer, **JOBS[3]), 6)])
    for galore, owlore in zip(*found, strict=True):
        assert all(torch.equal(galore[name], owlore[name]) for name in galore)


@pytest.mark.parametrize(("rounding", "moments"), list(itertools.product(("stochastic", "fp32"), ("follow", "8bit"))))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_galores_of_what_trains(dtype, rounding, moments):
    size = []
    for method in (OwLore(rank=8, gamma=2, mode="uniform", rounding=rounding, moments=moments), None):
        named = list(toy_decoder(dtype, layers=LAYERS).named_parameters())
        if method is None:
            method, named = (
                GaLore(rank=8, rounding=rounding, moments=moments),
                [(name, p) for name, p in named if layer_of(name) in (None, 0, 1)],
            )
        optimizer = method.build(named, common.LR, 0)
        common.run(optimizer, named, range(1))
        size.append(common.state_bytes(optimizer))
    assert size[0] == size[1]


def test_on_smollm2_embeddings_make_the_state_which_8_bits_bring_down():
    """Shares of AdamW's state with gamma=2 and rank=64: the paper's models have far smaller embeddings."""
    sizes = {"vocab": 49152, "width": 576, "layers": 30, "heads": 9, "kv_heads": 3, "head_dim": 64, "hidden": 1536}
    size = {}
    with FakeTensorMode():
        for method in (AdamW(), OwLore(rank=64, mode="uniform"), OwLore(rank=64, mode="uniform", moments="8bit")):
            decoder = Decoder(ModelConfig(family="llama", context=512, tied=True, **sizes), torch.bfloat16)
            named = list(decoder.named_parameters())
            blocks = (
                [pair for pair in named if layer_of(pair[0]) in (None, 28, 29)] if method.name != "adamw" else named
            )
            optimizer = method.build(blocks, common.LR, 0)
            for _, p in blocks:
                p.grad = torch.empty_like(p)
            optimizer.step()
            size[str(method)] = common.state_bytes(optimizer)
    follow, quantised = (found / size["adamw"] for name, found in size.items() if name != "adamw")
    assert follow == pytest.approx(0.22, abs=0.01) and quantised < 0.15


def test_a_step_that_cannot_look_at_inputs_says_what_to_do():
    named = list(toy_decoder(layers=LAYERS).named_parameters())
    optimizer = OwLore(rank=8).build(named, common.LR, 0)
    with pytest.raises(UserError, match=r"owlore: mode=owl reads what goes into the layers: call step\(closure\)"):
        optimizer.step()
    with pytest.raises(UserError, match=r"saw no torch.nn.Linear of a layer at work"):
        optimizer.step(lambda: torch.tensor(0.0))


@pytest.mark.parametrize("knobs", [{"gamma": 0}, {"period": 0}, {"mode": "outliers"}, {"threshold": 0.0}])
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        OwLore(**knobs)
