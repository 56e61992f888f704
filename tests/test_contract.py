"""What every method promises, tried on a tiny model; generated from the cards, so that a new method is held to it too.

Every method runs in the job of its slot with all else plain: a model of three layers, three optimizer steps in float32.
A rehearsal is held to a model that is large enough for its bytes to be tensors' rather than small change.
"""

import dataclasses
import math
import typing

import pytest
import torch

from satchel.adapt import load_peft, save_peft
from satchel.core import book
from satchel.core.card import ACCOUNTS, COSTS, Fidelity
from satchel.core.errors import UserError
from satchel.core.job import TuneJob
from satchel.core.knobs import RANGE
from satchel.core.seams import Domain
from satchel.model.adapters import adapted, attach, detach
from satchel.model.batch import Batch
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.kv import token_bytes
from satchel.model.linear import linears, swap
from satchel.model.paged import PAGE, Pool
from satchel.run.assemble import assemble
from satchel.run.rehearse import rehearse
from satchel.run.step import mean_loss, train_step
from tests.run.real import needs_pool, real_peaks
from tests.tolerances import FOUR_BITS, REHEARSED, TOLERANCE

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
    }
)
PLAIN = TuneJob(
    model="tiny", data="tiny", dtype="fp32", adapter="none", lr=1e-2, batch=4, context=64, schedule="constant"
)
LARGER = {"model_type": "llama", "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 640}
LARGER |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
LARGER |= {"rms_norm_eps": 1e-5}
ENTRIES = book.entries()
COMPUTED = (
    "surgery",
    "adapter",
    "optimizer",
    "format",
    "activations",
    "objective",
    "checkpoint",
)  # slots whose methods touch tensors


def entries(*slots, where=lambda card: True):
    chosen = [e for e in ENTRIES if (not slots or e.slot in slots) and where(e.card)]
    return pytest.mark.parametrize("entry", chosen, ids=lambda e: f"{e.slot}-{e.name}")


def spelled(entry):
    """The method with the knobs that suit a tiny model."""
    return str(entry.load()(**entry.card.demo))


def job_of(entry):
    """The plain job with this method in its slot, at its own scale of learning rates; a format needs an adapter."""
    changes = {"adapter": "lora:rank=4"} if entry.slot == "format" else {}
    if entry.slot == "optimizer":
        adamw = PLAIN.replace(lr=0.0).peak_lr
        changes = {"lr": PLAIN.lr * book.make("optimizer", spelled(entry)).usual_lr(adamw, adapted=False) / adamw}
    return PLAIN.replace(**changes, **{entry.slot: spelled(entry)})


def large_job_of(entry):
    return job_of(entry).replace(batch=2, micro_batch=2, context=128)


def tiny(job=PLAIN):
    decoder = Decoder(CONFIG)
    decoder.init_weights(torch.Generator().manual_seed(1))
    storage = book.make("format", job.format)
    for path, module in linears(decoder).items() if storage else ():
        swap(decoder, path, storage.pack(module.weight.detach()))
    return decoder


def batches(seed=2):
    """Four documents of uneven lengths in two micro-batches."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    for lengths in ((13, 20), (7, 31)):
        tokens_N = torch.randint(96, (sum(lengths),), generator=rng)
        ends = torch.tensor(lengths).cumsum(0) - 1
        targets_N = tokens_N.roll(-1).index_fill(0, ends, -100)
        made.append(Batch(tokens_N[None], targets_N[None], lengths, sum(lengths) - len(lengths)))
    return made


def run(job, steps=3):
    """Losses of some optimizer steps, and the model after them."""
    torch.manual_seed(job.seed)
    assembly = assemble(job, tiny(job))
    factors = [assembly.schedule.at(step, steps) for step in range(steps)]
    losses = [float(train_step(assembly, batches(), assembly.lr * factor)["loss"]) for factor in factors]
    return losses, assembly


def logits(model):
    with torch.no_grad():
        return model.eval()(batches()[0].tokens_1N)


@entries()
def test_the_card_is_complete(entry):
    card, knobs = entry.card, {knob.name: knob for knob in entry.knobs}
    assert card.paper.startswith("https://")
    assert set(card.saves + card.spends) <= {*ACCOUNTS, *COSTS}
    assert card.fidelity in typing.get_args(Fidelity)
    assert set(card.demo) <= set(knobs)
    if card.dial:
        name, low, high = card.dial
        assert knobs[name].kind.removesuffix(" | None") in ("int", "float") and low != high


@entries()
def test_a_method_prints_what_makes_it(entry):
    method = entry.load()(**entry.card.demo)
    again = book.make(entry.slot, str(method))
    assert again == method and hash(again) == hash(method)
    assert method.name == entry.name and str(method).startswith(entry.name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.name = "another"


@entries("kv")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored_of_a_token_follows_from_it_alone_and_takes_what_it_says(entry, dtype):
    method = entry.load()(**entry.card.demo)
    x_NKE = torch.randn(9, 2, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    stored = method.encode(x_NKE)
    assert tuple((part.dtype, part.shape[-1]) for part in stored) == method.parts(16, dtype)
    assert all(part.shape[:-1] == x_NKE.shape[:-1] for part in stored)
    for token, head in ((0, 0), (4, 1), (8, 0)):
        alone = method.encode(x_NKE[token : token + 1, head : head + 1])
        both = zip(alone, stored, strict=True)
        assert all(torch.equal(mine[0, 0], theirs[token, head]) for mine, theirs in both)
    again = method.decode(stored, dtype)
    assert again.dtype == dtype and again.shape == x_NKE.shape
    pool = Pool(CONFIG, 5, dtype, kv=str(method))
    halves = 2 * CONFIG.layers * CONFIG.kv_heads * PAGE
    assert pool.block_bytes == halves * token_bytes(method, CONFIG.head_dim, dtype) < Pool(CONFIG, 5, dtype).block_bytes


@entries()
def test_the_ranges_in_the_comments_hold_in_python_too(entry):
    for knob in entry.knobs:
        if not (found := RANGE.search(knob.comment)):
            continue
        low, high = float(found[2]), float(found[3])
        for outside in (low if found[1] == "(" else low - 1, high if found[4] == ")" else high + 1):
            if math.isfinite(outside):
                with pytest.raises(UserError):
                    entry.load()(**{knob.name: int(outside) if knob.kind == "int" else outside})


@entries(*COMPUTED, "schedule")
def test_a_step_lowers_the_loss_and_a_seed_fixes_the_run(entry):
    losses, _ = run(job_of(entry))
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    assert run(job_of(entry))[0] == losses


@pytest.fixture(scope="module")
def measured():
    """The peaks of a real run of every method's job, by job."""
    jobs = list({large_job_of(entry): None for entry in ENTRIES if entry.slot in COMPUTED})
    return dict(zip(jobs, real_peaks([(LARGER, job, ()) for job in jobs]), strict=True))


@needs_pool
@entries(*COMPUTED)
def test_rehearsed_bytes_are_the_measured_ones(entry, measured):
    job = large_job_of(entry)
    rehearsed = {phase.name: phase.peak_bytes for phase in rehearse(job, ModelConfig.from_hf(LARGER)).phases}
    for phase in ("load", "train"):
        assert rehearsed[phase] == pytest.approx(measured[job][phase], rel=REHEARSED), phase


@entries("optimizer", "activations", "objective", "checkpoint", where=lambda card: card.fidelity == "exact")
def test_what_is_exact_gives_the_plain_jobs_losses(entry):
    losses, _ = run(job_of(entry), steps=4)
    assert losses == pytest.approx(run(PLAIN, steps=4)[0], rel=TOLERANCE[torch.float32])


@entries("optimizer", "activations", "objective", where=lambda card: card.dial)
def test_the_neutral_end_of_a_dial_is_the_plain_job_or_is_refused(entry):
    """An adapter's dial has no such end: at any rank the base is frozen."""
    knob, _, neutral = entry.card.dial
    plain, _ = run(PLAIN, steps=4)
    try:
        losses, _ = run(PLAIN.replace(**{entry.slot: f"{entry.name}:{knob}={neutral}"}), steps=4)
    except UserError as refusal:
        assert f"{entry.name}: {knob}={neutral} leaves no" in str(refusal)
    else:
        assert losses == plain
    assert entry.card.fidelity == "exact" or run(job_of(entry), steps=4)[0] != plain


@entries("schedule")
def test_a_schedule_stays_between_nothing_and_the_peak(entry):
    schedule = entry.load()(**entry.card.demo)
    for steps in (1, 2, 7, 100):
        factors = [schedule.at(step, steps) for step in range(steps)]
        assert all(0 <= factor <= 1 for factor in factors) and max(factors) > 0


@entries("mixture")
def test_a_mixture_gives_shares_and_a_job_that_has_some_length(entry):
    mixture = entry.load()(**entry.card.demo)
    domains = [Domain("a", 0.5, 7.0), Domain("b", 0.3, 90.0), Domain("c", 0.2, 0.5)]
    for steps in (1, 2, 7, 100):
        for step in range(steps):
            shares = mixture.at(step, steps, domains)
            assert (
                len(shares) == 3 and min(shares) >= 0 and math.isclose(sum(shares), 1, rel_tol=TOLERANCE[torch.float64])
            )
    assert mixture.epoch_steps(domains) > 0


@entries("adapter")
def test_an_adapter_is_neutral_at_birth_and_gone_when_detached(entry):
    model = tiny()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    before = logits(model)
    attach(model, entry.load()(**entry.card.demo), torch.Generator().manual_seed(3))
    torch.testing.assert_close(logits(model), before, rtol=TOLERANCE[torch.float32], atol=TOLERANCE[torch.float32])
    detach(model)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert torch.equal(logits(model), before)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained


@entries("adapter")
def test_tuning_an_adapter_leaves_the_base_bit_for_bit(entry):
    before = tiny().state_dict()
    _, assembly = run(job_of(entry))
    tuned = logits(assembly.model)
    assert list(adapted(assembly.model))
    detach(assembly.model)
    after = assembly.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not torch.equal(logits(assembly.model), tuned)


@entries("adapter")
def test_what_merging_adds_is_what_the_adapter_does(entry):
    _, assembly = run(job_of(entry))
    method = assembly.adapter
    place = next(place for _, place in adapted(assembly.model))
    delta_OI = method.delta(place.adapters["default"], place.base)
    if delta_OI is None:
        pytest.skip("it cannot be merged")
    x_NI = torch.randn(9, place.in_features, generator=torch.Generator().manual_seed(4))
    merged_NO = x_NI @ (place.dense() + delta_OI).T
    with torch.no_grad():
        torch.testing.assert_close(
            place.eval()(x_NI), merged_NO, rtol=TOLERANCE[torch.float32], atol=TOLERANCE[torch.float32]
        )


@entries("adapter", "format")
def test_what_was_tuned_comes_back_from_disk_with_the_same_output(entry, tmp_path):
    job = job_of(entry)
    _, assembly = run(job)
    save_peft(assembly.model, tmp_path / "adapter")
    again = tiny(job)
    untuned = logits(again)
    load_peft(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(assembly.model))
    assert not torch.equal(logits(again), untuned)


@entries("format")
def test_a_format_gives_the_same_matrix_after_its_buffers_were_copied(entry):
    method = entry.load()(**entry.card.demo)
    weight_OI = torch.randn(64, 128, generator=torch.Generator().manual_seed(5)) * 0.02
    packed, other = method.pack(weight_OI), method.pack(torch.zeros(64, 128))
    other.load_state_dict(packed.state_dict())
    assert torch.equal(other.dense(), packed.dense())
    assert sum(b.nbytes for b in packed.buffers()) < weight_OI.nbytes / 3
    error = (packed.dense().float() - weight_OI).norm() / weight_OI.norm()
    assert error < FOUR_BITS


@entries("optimizer")
def test_an_optimizers_state_is_all_in_its_state_dict(entry):
    """A fresh optimizer that takes over state and weights goes on as the first one would have."""
    whole, _ = run(job_of(entry), steps=4)
    losses, first = run(job_of(entry), steps=2)
    second = assemble(job_of(entry), tiny())
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    losses += [float(train_step(second, batches(), second.lr)["loss"]) for _ in range(2)]
    assert losses == whole


@entries("activations")
def test_recomputing_leaves_evaluation_alone(entry):
    plain, wrapped = (assemble(job, tiny()) for job in (PLAIN, job_of(entry)))
    assert mean_loss(wrapped, batches()) == mean_loss(plain, batches())


@entries("optimizer")
def test_an_optimizer_writes_nothing_before_its_steps_hooks_have_run(entry):
    """A checkpoint is copied until they have. A `step` of its own calls `before_write` first of all."""
    assembly = assemble(job_of(entry), tiny())
    train_step(assembly, batches(), assembly.lr)

    def held():
        state = [value for state in assembly.optimizer.state.values() for value in state.values()]
        tensors = [p for _, p in assembly.parameters] + [value for value in state if isinstance(value, torch.Tensor)]
        return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in tensors])

    before, found = held(), []
    assembly.optimizer.register_step_pre_hook(lambda *_: found.append(torch.equal(held(), before)))
    train_step(assembly, batches(), assembly.lr)
    assert found == [True] and not torch.equal(held(), before)


@entries("checkpoint")
def test_a_checkpoint_is_that_of_the_step_it_was_saved_after(entry, tmp_path):
    """Whatever the next step does."""
    assembly = assemble(job_of(entry), tiny())
    tensors = {name: parameter.detach() for name, parameter in assembly.parameters}
    before, found = {name: tensor.clone() for name, tensor in tensors.items()}, {}

    def take(streams):
        found.update({name: b"".join(map(bytes, stream)) for name, stream in streams.items()})

    assembly.saver.save({"all": tensors}, take)
    train_step(assembly, batches(), assembly.lr)
    assembly.saver.finish()
    assert found["all"] == b"".join(bytes(tensor.view(-1).view(torch.uint8).numpy()) for tensor in before.values())
