"""A file's own blocks are multiplied by as they are."""

import subprocess
import sys

import pytest
import torch

from satchel.adapt.lora import Lora
from satchel.compress import stored
from satchel.compress.stored import Stored
from satchel.core.book import make
from satchel.core.errors import UserError
from satchel.core.request import Request, Sampling
from satchel.core.serve import ServeJob
from satchel.model.adapters import adapter_parameters, attach
from satchel.model.linear import dense_OI, linears
from satchel.model.load import load
from satchel.model.storage import storage
from satchel.model.tiles import TiledEmbedding, TiledLinear
from satchel.model.tiling import tiled_rows_in_torch
from satchel.native import linear as native
from satchel.native.build import build
from satchel.run.capacity import rehearse_engine
from satchel.run.engine import Engine
from satchel.run.scheduler import Limits
from tests.model.blocky import blocky
from tests.tolerances import EIGHT_BITS, REHEARSED, TOLERANCE, same

KINDS = ("Q4_0", "Q4_1", "Q8_0", "Q4_K")
TOKENS_BT = torch.randint(0, 203, (2, 20), generator=torch.Generator().manual_seed(0))

needs_compiler = pytest.mark.skipif(native.kernel() is None, reason="no C++ compiler")


@pytest.fixture
def source(tmp_path):
    return blocky(tmp_path, KINDS)


def test_every_matrix_takes_the_bytes_that_it_has_in_the_file(source):
    model = load(source, format=Stored(), frozen=True)
    tiled = [m for m in model.modules() if isinstance(m, TiledLinear)]
    stored = [t.nbytes for t in source.tensors.values() if len(t.shape) == 2]
    filled = -203 % 16 * 256 // 32 * 18  # rows of the embeddings, in Q4_0
    assert len(tiled) == len(stored) == 1 + 3 * 7
    assert sum(m.tiles.nbytes for m in tiled) == sum(stored) + filled
    assert isinstance(model.model.embed_tokens, TiledEmbedding) and model.lm_head is model.model.embed_tokens.base


def test_the_matrices_are_the_numbers_of_the_file(source):
    model, dense = load(source, torch.float32, format=Stored(), frozen=True), load(source, torch.float32)
    for path, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert torch.equal(dense_OI(model.get_submodule(path)), module.weight), path


def test_logits_are_those_of_the_unpacked_model(source):
    model, dense = load(source, torch.float32, format=Stored(), frozen=True), load(source, torch.float32)
    with torch.no_grad():
        ours, theirs = model(TOKENS_BT), dense(TOKENS_BT)
    assert (ours - theirs).norm() <= EIGHT_BITS * theirs.norm()


def test_without_a_kernel_torch_computes_the_same(source, monkeypatch):
    dense = load(source, torch.float32)
    monkeypatch.setattr(native, "kernel", lambda level="auto": None)
    model = load(source, torch.float32, format=Stored(), frozen=True)
    with torch.no_grad():
        assert same(model(TOKENS_BT), dense(TOKENS_BT))


@needs_compiler
def test_embeddings_are_rows_of_the_matrix_on_both_paths(source):
    embed = load(source, format=Stored(), frozen=True).model.embed_tokens
    base, expected = embed.base, embed.base.dense()[TOKENS_BT]
    in_torch = tiled_rows_in_torch(TOKENS_BT.flatten(), base.tiles, base.kind, 256, base.dtype)
    assert torch.equal(embed(TOKENS_BT), expected) and torch.equal(in_torch.view(expected.shape), expected)
    with pytest.raises(IndexError):
        embed(torch.tensor([[208]]))


def test_blocks_of_other_kinds_become_q8_0(tmp_path):
    source = blocky(tmp_path, ("Q6_K",))
    model, dense = load(source, torch.float32, format=Stored()), load(source, torch.float32)
    ours, theirs = model.layers[1].mlp.up_proj, dense.layers[1].mlp.up_proj.weight
    assert ours.kind == "Q8_0" and (ours.dense() - theirs).norm() < 0.01 * theirs.norm()


def test_what_trains_around_the_blocks_gets_its_gradient_through_them(source):
    layer = load(source, torch.float32, format=Stored()).layers[0].mlp.up_proj
    x = torch.randn(5, 256, requires_grad=True)
    (layer(x) * 2).sum().backward()
    assert same(x.grad, layer.dense().sum(0).mul(2).expand(5, -1))


@needs_compiler
@pytest.mark.parametrize(
    ("kinds", "format"), [(KINDS, "stored"), *((("BF16",), name) for name in ("stored", "int8", "int4"))]
)
def test_a_load_and_a_step_take_what_was_rehearsed(kinds, format, tmp_path):
    source = blocky(tmp_path, kinds)
    job = ServeJob(model="x", format=format, step_tokens=512)
    accounts = rehearse_engine(job, source.config, "cpu", source)
    model = load(source, format=make("format", format), frozen=True)
    held = {t.data_ptr(): t.nbytes for t in (*model.buffers(), *model.parameters())}
    assert accounts["weights"] == pytest.approx(sum(held.values()), rel=REHEARSED)
    short = rehearse_engine(job.replace(step_tokens=64), source.config, "cpu", source)  # nothing is unpacked for it
    assert short.get("workspace", 0) < rehearse_engine(job.replace(format="none"), source.config, "cpu")["weights"]


@needs_compiler
def test_a_model_in_blocks_is_served_from_them_unless_another_format_is_named(source):
    assert storage("auto", source, "cpu") == "stored"
    assert storage("auto", source, "cuda") == "none" and storage("none", source, "cpu") == "none"


@needs_compiler
def test_so_is_a_model_in_16_bits_whose_rows_fill_tiles(tmp_path):
    plain, odd = blocky(tmp_path, ("BF16",)), blocky(tmp_path, ("BF16",), intermediate_size=500)
    assert storage("auto", plain, "cpu") == "stored" and storage("auto", plain, "cpu", "fp32") == "none"
    assert storage("auto", odd, "cpu") == "none"


@needs_compiler
def test_a_model_in_16_bits_keeps_its_numbers_and_its_bytes(tmp_path):
    source = blocky(tmp_path, ("BF16",))
    model, dense = load(source, format=Stored(), frozen=True), load(source)
    tiled = [m for m in model.modules() if isinstance(m, TiledLinear)]
    assert {m.kind for m in tiled} == {"BF16"} and len(tiled) == 1 + 3 * 7
    filled = -203 % 16 * 256 * 2  # rows of the embeddings
    assert sum(m.tiles.nbytes for m in tiled) == filled + sum(p.nbytes for p in dense.parameters() if p.dim() == 2)
    for path, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert torch.equal(dense_OI(model.get_submodule(path)), module.weight), path
    with torch.no_grad():
        ours, theirs = model(TOKENS_BT), load(source, torch.float32)(TOKENS_BT)
    assert (ours - theirs).norm() <= TOLERANCE[torch.bfloat16] * theirs.norm()


@needs_compiler
@pytest.mark.parametrize("format", ["stored", "int8", "int4"])
def test_a_lora_trains_over_tiles_as_over_the_matrices_in_them(format, tmp_path):
    source, losses = blocky(tmp_path, ("BF16",)), []
    for model in (load(source, format=make("format", format)), load(source)):
        if losses:
            fill_in(model, load(source, format=make("format", format)))
        attach(model, Lora(rank=4), torch.Generator().manual_seed(0))
        optimizer = torch.optim.Adam([p for _, p in adapter_parameters(model)], lr=2e-3)
        for _ in range(5):
            loss = torch.nn.functional.cross_entropy(
                model(TOKENS_BT)[:, :-1].flatten(0, 1).float(), TOKENS_BT[:, 1:].flatten()
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[4] < losses[0] and losses[:5] == pytest.approx(losses[5:], rel=TOLERANCE[torch.bfloat16])


def fill_in(dense, packed):
    """The packed maps' numbers into dense ones."""
    for path, module in linears(packed).items():
        dense.get_submodule(path).weight.data.copy_(dense_OI(module))


@pytest.mark.parametrize("level", native.levels.supported())
def test_greedy_answers_do_not_depend_on_the_company_while_rows_are_few(source, level):
    model = load(source, torch.bfloat16, format=Stored(level=level), frozen=True)
    prompts = [tuple(range(2 + i, 6 + 2 * i)) for i in range(5)]  # 30 tokens

    def answers(some):
        engine = Engine(model, Limits(blocks=64, batch=8, step_tokens=64, context=128))
        ids = [engine.submit(Request(prompt=p, max_tokens=12, sampling=Sampling(temperature=0))) for p in some]
        said = {id: [] for id in ids}
        for event in engine.run():
            said[event.id] += event.tokens
        return [said[id] for id in ids]

    together = answers(prompts)
    assert together == [answers([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("level", ["sse9", "amx"])
def test_a_level_that_this_processor_has_not_is_refused(level, monkeypatch):
    monkeypatch.setattr(stored, "supported", lambda: ("avx2", "portable"))
    with pytest.raises(UserError, match=f"level='{level}' is none that this processor has: auto, avx2, portable"):
        Stored(level=level)


def test_a_broken_kernel_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "right", lambda kernel, kind: kernel.level == "portable" and kind != "BF16")
    native.kernel.cache_clear()
    try:
        assert native.kernel() is None
        monkeypatch.setattr(native, "right", lambda kernel, kind: kernel.level == "portable")
        native.kernel.cache_clear()
        assert build("linear", native.levels.flags("portable")) is None or native.kernel().level == "portable"
    finally:
        native.kernel.cache_clear()


FIRST = """
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.run.rehearse import rehearse
from satchel.run.warm import MINIATURE
job = TuneJob(model="toy", data="demo", format="stored", device="cpu", context=32, batch=1, micro_batch=1)
assert rehearse(job, ModelConfig.from_hf(MINIATURE), (32,), "cpu").peak.peak_bytes
"""


@needs_compiler
def test_a_rehearsal_may_be_the_first_that_asks_for_the_kernel():
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
