"""MeZO: its published step, its variants, and the memory of inference."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from satchel.core.errors import UserError
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.optim._directions import drawn, estimate
from satchel.optim._zeroth import Part, consecutive
from satchel.optim.mezo import MeZO
from satchel.run.assemble import assemble
from satchel.run.packing import pack
from satchel.run.rehearse import rehearse
from satchel.run.step import StepLoss, take_step, train_step
from tests.optim import common, zeroth
from tests.run.real import needs_pool, real_peaks
from tests.run.test_rehearse import TOY
from tests.run.test_step import uneven
from tests.run.toys import toy_decoder, toy_job
from tests.tolerances import DEVIATIONS, REHEARSED, TOLERANCE

CPU, WIDE, NARROW = torch.device("cpu"), torch.float32, torch.bfloat16
UPDATES = ("sgd", "sign", "conservative", "momentum", "adam")
LR = {"sgd": 5e-3, "sign": 2e-2, "conservative": 5e-3, "momentum": 5e-4, "adam": 2e-2}
RADIUS = {WIDE: 1e-3, NARROW: 0.05}  # weights near 1 hop by 0.008 or not at all


def updates(dtypes=(WIDE, NARROW)):
    """Every update in every dtype that it takes."""
    pairs = itertools.product(UPDATES, dtypes)
    return pytest.mark.parametrize(("update", "dtype"), [p for p in pairs if p != ("conservative", NARROW)])


def directions(optimizer, step, count):
    """The z of a step for each parameter, by the optimizer's own seeds."""
    found = []
    for _, p in optimizer.index():
        draw = optimizer.draw(optimizer_part(optimizer, p))
        assert optimizer.state[p].get("step", 0) == step and len(draw.seeds) == count
        found.append([drawn(s, 0, 0, slice(0, p.numel()), CPU).view_as(p) for s in draw.seeds])
    return found


def optimizer_part(optimizer, p):
    return next(Part(number, group, q) for number, (group, q) in enumerate(optimizer.index()) if q is p)


@torch.no_grad()
def published(ps, loss, zs, lr, radius):
    """MeZO's Algorithm 1 with q directions: perturb, measure, perturb back, measure, restore; then descend."""
    slopes = []
    for k in range(len(zs[0])):
        for size in (radius, -2 * radius):
            for p, z in zip(ps, zs, strict=True):
                p.add_(z[k] * size)
            slopes.append(loss())
        for p, z in zip(ps, zs, strict=True):
            p.add_(z[k] * radius)
    for k, (up, down) in enumerate(zip(slopes[::2], slopes[1::2], strict=True)):
        for p, z in zip(ps, zs, strict=True):
            p.sub_(z[k] * (lr / len(zs[0]) * (up - down) / (2 * radius)))


@pytest.mark.parametrize("count", [1, 3])
def test_each_step_is_the_published_one_with_the_same_z(count):
    ours, loss, _ = zeroth.quadratic(shapes=((12, 8), (5,), (7, 3)))
    theirs, other, _ = zeroth.quadratic(shapes=((12, 8), (5,), (7, 3)))
    optimizer, radius = MeZO(directions=count, radius=1e-2).build(ours, 5e-3, 0), 1e-2
    for step in range(20):
        zs = {id(p): z for (_, p), z in zip(optimizer.index(), directions(optimizer, step, count), strict=True)}
        published([p for _, p in theirs], other, [zs[id(p)] for _, p in ours], 5e-3, radius)
        optimizer.step(loss)
        for (_, p), (_, q) in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=3e-5)  # places are rounded, to 1e-5 of r


def test_the_mean_of_many_estimates_is_the_gradient():
    zeroth.check_the_mean_of_many_estimates_is_the_gradient(MeZO(directions=2000, radius=1e-2), near=0.96)


def test_in_bfloat16_it_is_the_gradient_by_how_much_each_element_takes_part():
    """E[rho z] = E[z^2] g: elements that hop to one side only, or seldom, count for less."""
    method, (named, loss, gradients) = MeZO(directions=2000, radius=0.05), zeroth.quadratic(NARROW)
    w = named[0][1].detach().clone().view(-1)
    optimizer = method.build(named, 1.0, 0)
    seeds = optimizer.draw(optimizer_part(optimizer, named[0][1])).seeds
    part = (
        torch.stack([estimate(w, None, torch.ones(1), [seed], 0.05, 0, 0).float() for seed in seeds]).square().mean(0)
    )
    want = gradients()[0].view(-1)
    optimizer.step(loss)
    moved = w.float() - named[0][1].detach().float().view(-1)
    assert zeroth.cosine(moved, part * want) > 0.95
    assert zeroth.cosine(moved, want) > 0.8


def test_more_directions_make_a_better_estimate():
    """The cosine with the gradient of n elements from q directions is near sqrt(q / (q + n))."""
    found = {}
    for count in (1, 16):
        cosines = []
        for seed in range(30):
            named, loss, gradients = zeroth.quadratic()
            before, want = named[0][1].detach().clone(), gradients()[0]
            MeZO(directions=count).build(named, 1e-3, seed).step(loss)
            cosines.append(zeroth.cosine(before - named[0][1].detach(), want))
        found[count] = sum(cosines) / 30
    for count, cosine in found.items():
        assert cosine == pytest.approx(math.sqrt(count / (count + 96)), abs=0.1 if count == 1 else 0.05)


@updates()
def test_every_update_descends(update, dtype):
    method = MeZO(update=update, radius=RADIUS[dtype])
    zeroth.check_every_update_descends(method, LR[update], dtype)


def test_sign_descent_moves_by_the_learning_rate_whatever_the_slope():
    steps = []
    for scale in (1.0, 1e3):
        named, loss, _ = zeroth.quadratic()
        before = named[0][1].detach().clone()
        MeZO(update="sign").build(named, 1e-2, 0).step(lambda loss=loss, scale=scale: loss() * scale)
        steps.append(before - named[0][1].detach())
    torch.testing.assert_close(*steps, rtol=1e-3, atol=1e-5)
    assert steps[0].abs().max() < 1e-2 * 3.5


def test_momentum_is_the_heavy_balls_and_adam_is_adams():
    for update, reference in (
        ("momentum", lambda ps: torch.optim.SGD(ps, 1e-3, momentum=0.9)),
        ("adam", lambda ps: torch.optim.Adam(ps, 1e-3)),
    ):
        named, loss, _ = zeroth.quadratic()
        theirs = nn.Parameter(named[0][1].detach().clone())
        optimizer, other = MeZO(update=update).build(named, 1e-3, 0), reference([theirs])
        for step in range(10):
            part = optimizer_part(optimizer, named[0][1])
            before, (z,) = named[0][1].detach().clone(), directions(optimizer, step, 1)[0]
            with torch.no_grad():
                rho = optimizer.slope([part], 0, loss)
                named[0][1].copy_(before)
            theirs.grad = rho * z
            other.step()
            optimizer.step(loss)
            torch.testing.assert_close(named[0][1], theirs, rtol=TOLERANCE[WIDE], atol=1e-5)


@pytest.mark.parametrize(("dtype", "rounding"), [(WIDE, "stochastic"), (NARROW, "fp32")])
def test_a_conservative_step_never_climbs_where_a_plain_one_does(dtype, rounding):
    def run(update):
        named, loss, _ = zeroth.quadratic(dtype)
        optimizer, values = MeZO(update=update, rounding=rounding).build(named, 0.05, 0), []
        for _ in range(60):
            optimizer.step(loss)
            values.append(zeroth.value(loss))
        return sum(b > a * (1 + 2**-8) for a, b in itertools.pairwise(values))

    assert run("conservative") == 0 < run("sgd")


def test_a_conservative_step_in_bfloat16_needs_the_low_bits():
    named, _, _ = zeroth.quadratic(NARROW)
    with pytest.raises(UserError, match=r"layers\.0\.w in bfloat16 has no bits; add rounding=fp32"):
        MeZO(update="conservative").build(named, 1e-2, 0)


class TestBlocks:
    def test_each_part_is_measured_by_itself_and_all_take_part(self):
        named = [(f"layers.{i}.w", nn.Parameter(torch.ones(4))) for i in range(4)]
        before, seen = [p.detach().clone() for _, p in named], []

        def loss():
            seen.append([bool((p - b).abs().max() > 1e-5) for (_, p), b in zip(named, before, strict=True)])
            return sum(p.sum() for _, p in named)

        MeZO(blocks=4).build(named, 0.0, 0).step(loss)
        assert seen == [[i == part for i in range(4)] for part in range(4) for _ in range(2)]

    def test_they_are_consecutive_none_empty_and_of_about_equal_size(self):
        sizes = [100, 1, 1, 30, 30, 1, 30, 30, 2, 40]
        for count in range(1, 12):
            parts = consecutive(sizes, count)
            assert sum(parts, []) == list(range(10)) and len(parts) == min(count, 10) and all(parts)
        assert max(sum(sizes[i] for i in part) for part in consecutive(sizes, 3)) <= 100

    def test_the_estimates_variance_falls_with_their_number(self):
        """Along a direction of n elements the estimate's variance is about n |g|^2 / n an element, so n times less."""
        shapes = ((8, 8),) * 8
        variances = []
        for blocks in (1, 8):
            estimates = []
            for seed in range(60):
                named, loss, _ = zeroth.quadratic(shapes=shapes)
                before = [p.detach().clone() for _, p in named]
                MeZO(blocks=blocks).build(named, 1e-4, seed).step(loss)
                moved = [(b - p.detach()).flatten() for (_, p), b in zip(named, before, strict=True)]
                estimates.append(torch.cat(moved) / 1e-4)
            variances.append(float(torch.stack(estimates).var(0).mean()))
        assert variances[1] == pytest.approx(variances[0] / 8, rel=0.3)


class TestSparsity:
    def touched(self, seed, steps, resample):
        """Which elements have moved after each step."""
        named, loss, _ = zeroth.quadratic(shapes=((64, 64),))
        optimizer, found = MeZO(sparsity=0.9, resample=resample).build(named, 1e-3, seed), []
        for _ in range(steps):
            before = named[0][1].detach().clone()
            optimizer.step(loss)
            found.append((named[0][1].detach() - before).abs() > 1e-6)
        return found

    def test_a_share_of_the_elements_stays_where_it_is(self):
        share = self.touched(0, 1, 1)[0].float().mean().item()
        assert share == pytest.approx(0.1, abs=DEVIATIONS * math.sqrt(0.09 / 4096))

    def test_it_is_the_seeds_and_drawn_anew_every_so_many_steps(self):
        first, second, third, fourth = self.touched(0, 4, 2)
        same = lambda a, b: float((a == b).float().mean())  # noqa: E731
        assert same(first, second) > 0.99 and same(third, fourth) > 0.99  # but for elements of z near zero
        assert same(second, third) < 0.9
        assert torch.equal(self.touched(0, 1, 2)[0], first)
        assert same(self.touched(1, 1, 2)[0], first) < 0.9


@pytest.mark.parametrize("dtype", [WIDE, NARROW])
def test_weights_are_back_when_the_loss_raises(dtype):
    named, _, _ = zeroth.quadratic(dtype)
    before, optimizer = named[0][1].detach().clone(), MeZO().build(named, 1e-3, 0)
    calls = iter([torch.tensor(1.0)])

    def fail():
        return next(calls)

    with pytest.raises(StopIteration):
        optimizer.step(fail)
    torch.testing.assert_close(named[0][1].detach(), before, rtol=0, atol=1e-6 if dtype == WIDE else 0)
    assert "step" not in optimizer.state[named[0][1]]


@updates()
def test_a_resumed_run_is_the_uninterrupted_one(update, dtype):
    method = MeZO(update=update, radius=RADIUS[dtype], sparsity=0.5, resample=3, blocks=2)
    zeroth.check_a_resumed_run_is_the_uninterrupted_one(method, dtype)


@pytest.mark.parametrize("update", ["sgd", "momentum", "adam"])
def test_state_bytes_equal_the_formula(update):
    for dtype, rounding in itertools.product((WIDE, NARROW), ("stochastic", "fp32")):
        named, loss, _ = zeroth.quadratic(dtype)
        optimizer = MeZO(update=update, rounding=rounding, radius=0.05).build(named, 1e-3, 0)
        optimizer.step(loss)
        moments = {"sgd": 0, "momentum": 1, "adam": 2}[update] * dtype.itemsize
        low = 2 * (rounding == "fp32" and dtype == NARROW)
        assert common.state_bytes(optimizer) == 96 * (moments + low)


@pytest.mark.parametrize("update", UPDATES)
def test_fake_tensors_give_the_same_state(update):
    method = MeZO(update=update, directions=1, rounding="fp32")
    named, loss, _ = zeroth.quadratic(NARROW)
    real = method.build(named, 1e-3, 0)
    real.step(loss)
    with FakeTensorMode():
        w = nn.Parameter(torch.empty(12, 8, dtype=NARROW))
        fake = method.build([("layers.0.w", w)], 1e-3, 0)
        fake.step(lambda: w.float().square().sum())
    described = [
        {k: (v.shape, v.dtype) if isinstance(v, torch.Tensor) else v for k, v in state.items()}
        for optimizer in (real, fake)
        for state in optimizer.state.values()
    ]
    assert described[0] == described[1]


def test_only_what_trains_moves_and_micro_batches_change_nothing(tmp_path):
    """Over LoRA, in six rows at once or two: the same losses, the base untouched."""
    ends = []
    for rows in (6, 2):
        job = toy_job(tmp_path, optimizer="mezo", lr=1e-3)
        assembly = assemble(job, toy_decoder())
        base = {n: p.detach().clone() for n, p in assembly.model.named_parameters() if not p.requires_grad}
        batches = pack(uneven(), range(12), 32).batches(range(6), rows)
        losses = [float(train_step(assembly, batches, 1e-3)["loss"]) for _ in range(5)]
        assert all(torch.equal(p, base[n]) for n, p in assembly.model.named_parameters() if n in base)
        ends.append(torch.tensor(losses))
    torch.testing.assert_close(*ends, rtol=1e-3, atol=0)


def test_the_same_step_gives_the_same_weights_whatever_was_computed_between(tmp_path):
    """The losses that are compared see the same dropout."""
    job = toy_job(tmp_path, optimizer="mezo", adapter="lora:rank=4,dropout=0.3")
    assembly = assemble(job, toy_decoder())
    batches, seen = pack(uneven(), range(12), 32).batches(range(6), 6), []

    def micro_batches():
        torch.manual_seed(5)
        return batches

    def around(compute):
        seen.append(compute())
        return seen[-1]

    take_step(StepLoss(assembly, micro_batches, around), 0.0)
    up, down = (float(each["loss"]) for each in seen)
    assert abs(up - down) < 0.05 * abs(up)


INFERENCE = 1.1  # the most that the issue allows of inference's peak
JOBS = [
    {"optimizer": "mezo", "adapter": "none"},
    {"optimizer": "mezo", "adapter": "lora"},
    {"optimizer": "forward_gradient", "adapter": "lora", "dtype": "fp32"},
]


@pytest.fixture(scope="module")
def peaks():
    """Of every job, by phase: rehearsed, and of a real run."""
    jobs = [TuneJob(model="toy", data="demo", context=128, batch=4, micro_batch=2, **fields) for fields in JOBS]
    found = [{p.name: p.peak_bytes for p in rehearse(job, ModelConfig.from_hf(TOY)).phases} for job in jobs]
    return list(zip(found, real_peaks([(TOY, job, ()) for job in jobs]), strict=True))


@needs_pool
@pytest.mark.parametrize("number", range(len(JOBS)), ids=lambda number: " ".join(JOBS[number].values()))
def test_the_familys_peaks_are_rehearsed_and_mezos_is_inferences(number, peaks):
    rehearsed, real = peaks[number]
    assert rehearsed["train"] == pytest.approx(real["train"], rel=REHEARSED)
    if JOBS[number]["optimizer"] == "mezo":
        assert real["train"] <= INFERENCE * real["evaluate"]


def test_a_step_without_a_closure_says_what_it_needs():
    with pytest.raises(UserError, match=r"call step\(closure\)"):
        MeZO().build([("w", nn.Parameter(torch.ones(2, 2)))], 1e-3, 0).step()


def test_learning_rates_are_the_papers():
    assert MeZO().usual_lr(1e-4, adapted=False) == 1e-6
    assert MeZO().usual_lr(1e-3, adapted=True) == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "knobs",
    [
        {"update": "newton"},
        {"radius": 0.0},
        {"directions": 0},
        {"blocks": 0},
        {"sparsity": 1.0},
        {"resample": 0},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"eps": 0.0},
    ],
)
def test_knobs_out_of_range_are_refused(knobs):
    with pytest.raises(UserError, match=next(iter(knobs))):
        MeZO(**knobs)


def test_an_estimate_is_of_the_parameters_dtype():
    assert estimate(torch.ones(8, dtype=NARROW), None, torch.ones(1), [1], 0.0, 0, 0).dtype == NARROW
