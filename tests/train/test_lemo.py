"""Tokens that pass a block by cost nothing, those that do not see each other as before, and the predictor learns."""

import dataclasses

import pytest
import torch

from satchel.adapt.lora import Lora
from satchel.core.errors import UserError
from satchel.core.report import SILENT, Report
from satchel.model.attention import Place
from satchel.run import trainer
from satchel.run.assemble import assemble
from satchel.run.data import read_dataset
from satchel.train.causal_lm import CausalLM
from satchel.train.lemo import Eliminating, Lemo, received
from tests.run import toys as run_toys
from tests.run.toys import CharTokenizer, toy_job
from tests.tolerances import TOLERANCE
from tests.train.common import adapt, gradients, saved_bytes
from tests.train.toys import toy_batch, toy_decoder

EXACT = TOLERANCE[torch.float32]
HALF = Lemo(keep=0.5, group=2)


def middle(decoder):
    """The runs of the blocks between the first and the last."""
    return [run for run in decoder.runs if isinstance(run, Eliminating)]


def test_with_all_tokens_kept_it_is_the_plain_job_bit_for_bit():
    decoder, batch = toy_decoder(), toy_batch()
    for ours, plain in zip(gradients(decoder, Lemo(keep=1), batch), gradients(decoder, None, batch), strict=True):
        assert torch.equal(ours, plain)


def test_a_block_on_all_tokens_by_way_of_elimination_is_the_block():
    """Gathering every token, running and placing them: the arithmetic of elimination itself."""
    decoder, batch, found = toy_decoder(), toy_batch(), []
    decoder.wrap_blocks(Lemo(keep=0.99, group=2))
    for run in middle(decoder):
        run.method = dataclasses.replace(run.method, keep=1.0)
    for policy in (decoder.runs, []):
        decoder.runs = policy
        decoder.zero_grad()
        loss = CausalLM().loss(decoder, batch)[0]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in decoder.parameters())])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=EXACT, atol=EXACT)


def test_first_and_last_block_run_on_all_tokens():
    decoder = toy_decoder()
    decoder.wrap_blocks(HALF)
    assert [isinstance(run, Eliminating) for run in decoder.runs] == [False, True, True, False]


@pytest.mark.parametrize("lengths", [None, (13, 8, 11)])
def test_dropped_tokens_pass_and_kept_ones_attend_to_each_other_at_their_positions(lengths):
    decoder = toy_decoder()
    decoder.wrap_blocks(HALF)
    run, block = middle(decoder)[0], decoder.layers[1]
    x_1ND = torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(3))
    position_N, longest = torch.cat([torch.arange(n) for n in lengths or [32]]), max(lengths or [32])
    place = Place(decoder._tables(position_N, longest, x_1ND.dtype), lengths)
    chosen = []
    original = Eliminating.choose
    run.choose = lambda x, row: chosen.append(original(run, x, row)) or chosen[-1]
    y_1ND = run(x_1ND, place)
    (kept_M,) = chosen
    dropped = torch.ones(32, dtype=torch.bool).index_fill(0, kept_M, False)
    assert torch.equal(y_1ND[0, dropped], x_1ND[0, dropped]) and len(kept_M) == sum(-(-n // 2) for n in lengths or [32])
    start = 0
    for length in lengths or [32]:
        mine_m = kept_M[(kept_M >= start) & (kept_M < start + length)]
        tables = {rope: (cos[mine_m], sin[mine_m]) for rope, (cos, sin) in place.tables.items()}
        alone = block(x_1ND[:, mine_m], Place(tables))
        torch.testing.assert_close(y_1ND[:, mine_m], alone, rtol=EXACT, atol=EXACT)
        start += length


def test_a_plain_batch_is_the_same_documents_in_a_row():
    decoder = toy_decoder()
    tokens_BT = toy_batch((16, 16)).tokens_1N.view(2, 16)
    losses = []
    for tokens, lengths in ((tokens_BT, None), (tokens_BT.view(1, 32), (16, 16))):
        decoder.wrap_blocks(HALF)
        losses.append(decoder._run(tokens, lengths, None).flatten(0, 1))
    torch.testing.assert_close(*losses, rtol=EXACT, atol=EXACT)


def test_half_of_the_tokens_save_0_4_of_the_bytes_in_a_deep_model():
    decoder = toy_decoder(num_hidden_layers=16)
    assert saved_bytes(decoder, HALF, (128,)) <= 0.6 * saved_bytes(decoder, None, (128,))


def test_adapters_learn_through_kept_tokens_only():
    decoder, batch = toy_decoder(), toy_batch()
    adapt(decoder, Lora(targets=("layers.1.*",)))
    grads = [g for g in gradients(decoder, HALF, batch) if g is not None]
    assert grads and all(g.isfinite().all() and g.any() for g in grads)


def test_a_group_is_judged_by_what_one_of_its_tokens_receives():
    shares_SG = torch.tensor([[0.5, 0.5, 0.0], [0.3, 0.3, 0.4]])
    torch.testing.assert_close(received(shares_SG, 10, 4), torch.tensor([0.2, 0.2, 0.2]))


def test_queries_see_what_softmax_says():
    decoder = toy_decoder()
    attention = decoder.layers[1].self_attn
    x_1ND = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(4))
    place = Place(decoder._tables(torch.arange(12), 12, x_1ND.dtype))
    query_S = torch.tensor([2, 7, 11])
    shares_SN = attention.shares(x_1ND, query_S, place)
    q, k = attention._queries(x_1ND, place)[0], attention._keys(x_1ND, place)[0].repeat_interleave(2, 1)
    score_HNN = torch.einsum("qhe,khe->hqk", q, k) * attention.how["scale"]
    score_HNN = score_HNN.masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(shares_SN, score_HNN.softmax(-1).mean(0)[query_S], rtol=EXACT, atol=EXACT)


def recalls(decoder, batch):
    """Of each middle block's predictor on the inputs that it gets in a plain pass."""
    found, handles = [], []
    for run in middle(decoder):
        hook = lambda _, args, run=run: found.append(run.recall(*args))  # noqa: E731
        handles.append(run.block.register_forward_pre_hook(hook))
    with torch.no_grad():
        decoder.hidden(batch.tokens_1N, lengths=batch.lengths)
    for handle in handles:
        handle.remove()
    return found


def test_the_predictor_learns_whom_attention_looks_at_and_then_stops_to_learn():
    decoder = toy_decoder()
    decoder.wrap_blocks(Lemo(keep=0.25, group=2, learn=60))
    fresh = toy_batch((96,), seed=999)
    before = sum(recalls(decoder, fresh)) / 2
    for seed in range(60):
        CausalLM().loss(decoder, toy_batch((96,), seed=seed))
    after, state = sum(recalls(decoder, fresh)) / 2, {n: t.clone() for n, t in decoder.policy_state().items()}
    CausalLM().loss(decoder, fresh)
    assert 1 - after < 0.6 * (1 - before)  # what it misses; at first it knows no more than that early tokens are seen
    assert all(torch.equal(tensor, state[name]) for name, tensor in decoder.policy_state().items())


def test_what_the_predictors_know_is_a_part_of_checkpoints():
    decoder, other = toy_decoder(), toy_decoder()
    for each in (decoder, other):
        each.wrap_blocks(HALF)
    CausalLM().loss(decoder, toy_batch())
    mine, theirs = decoder.policy_state(), other.policy_state()
    assert mine.keys() == theirs.keys() and not torch.equal(
        mine["activations.1.predictor.A_DR"], theirs["activations.1.predictor.A_DR"]
    )
    for name, tensor in theirs.items():
        tensor.copy_(mine[name])
    losses = [CausalLM().loss(each, toy_batch(seed=5))[0] for each in (decoder, other)]
    assert torch.equal(*losses)


class Killed(Report):
    """Ends the run behind its fourth step."""

    def step(self, metrics):
        if metrics["step"] == 4:
            raise KeyboardInterrupt


def test_a_run_resumed_while_its_predictors_learn_is_the_undisturbed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "plot", lambda *_: False)  # half a second

    def go(name, report=SILENT, **changes):
        fields = {"out": str(tmp_path / name), "activations": "lemo:group=4,learn=20", "save_every": 1}
        job = toy_job(tmp_path, **fields, **changes)
        assembly = assemble(job, run_toys.toy_decoder(layers=3))
        trainer.train(job, assembly, read_dataset(job, CharTokenizer()), report)
        return assembly.lasting

    whole = go("whole")
    with pytest.raises(KeyboardInterrupt):
        go("killed", Killed())
    resumed = go("killed", resume=True)
    assert any(name.startswith("activations") for name in whole)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


@pytest.mark.parametrize("knobs", [{"keep": 0}, {"keep": 1.5}, {"group": 0}, {"learn": -1}])
def test_a_knob_out_of_range_is_refused(knobs):
    with pytest.raises(UserError, match="is outside|is below"):
        Lemo(**knobs)
