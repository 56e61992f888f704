"""What is exported is what was trained, or nothing is: broken and idle adapters are refused by name."""

import copy
import json

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from satchel.core.errors import ModelError, UserError
from satchel.model.adapters import Adapted, adapted
from satchel.model.linear import dense_OI
from satchel.model.load import load
from satchel.model.save import save
from satchel.model.source import find_source, load_tokenizer
from satchel.run import export as exporting
from satchel.run.assemble import assemble
from satchel.run.data import read_dataset
from satchel.run.export import divergence, export, merge, merge_checked, prompt_of, trace
from satchel.run.step import train_step
from tests.run.toys import CharTokenizer, toy_decoder, toy_job
from tests.tolerances import TOLERANCE

VOCABULARY = 300
EXACT = TOLERANCE[torch.float32]


@pytest.fixture
def base(tmp_path):
    """The folder of a toy model with a tokenizer of bytes."""
    torch.set_num_threads(1)
    save(toy_decoder(vocab=VOCABULARY, source=json.dumps(hf_config())), tmp_path / "base")
    alphabet = {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "base" / "tokenizer.json"))
    return tmp_path / "base"


def hf_config():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    rest = {"intermediate_size": 48, "vocab_size": VOCABULARY, "max_position_embeddings": 512, "head_dim": 8}
    return sizes | rest | {"model_type": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-6}


def trained(base, tmp_path, steps=8, dtype=torch.float32, **changes):
    """A job, and its model after a few steps."""
    job = toy_job(tmp_path, model=str(base), lr=0.02, **changes)
    assembly = assemble(job, load(str(base), dtype))
    rows = read_dataset(job, CharTokenizer()).train
    for step in range(steps):
        train_step(assembly, rows.batches(rows.step_rows(step, 6, 0, 10**6), 6), 0.02)
    return job, assembly


def prompt(base):
    return prompt_of(load_tokenizer(find_source(str(base))))


def logits(decoder, base):
    return trace(decoder, prompt(base)).logits_TV


def gap(ours, theirs):
    return float((ours - theirs).abs().max() / ours.abs().max())


@pytest.mark.parametrize("adapter", ["lora:rank=4", "rslora:rank=4", "dora:rank=4"])
def test_the_saved_adapter_merges_into_the_model_that_was_trained(base, tmp_path, adapter):
    job, assembly = trained(base, tmp_path, adapter=adapter)
    tuned = logits(assembly.model, base)
    assert gap(logits(load(str(base), torch.float32), base), tuned) > 0.05
    outputs = export(job, assembly, find_source(str(base)), prompt(base))
    assert outputs == {"adapter": str(tmp_path / "out" / "adapter")}
    assert {"adapter_config.json", "adapter_model.safetensors"} == {
        p.name for p in (tmp_path / "out/adapter").iterdir()
    }
    merged = merge(str(base), outputs["adapter"], tmp_path / "merged")
    assert gap(tuned, logits(load(str(merged), torch.float32), base)) < EXACT
    assert (merged / "tokenizer.json").exists()


def test_a_job_that_merges_leaves_both_and_transformers_agrees(base, tmp_path):
    transformers = pytest.importorskip("transformers")
    job, assembly = trained(base, tmp_path, merge=True)
    tuned = logits(assembly.model, base)
    outputs = export(job, assembly, find_source(str(base)), prompt(base))
    assert set(outputs) == {"adapter", "model"} and not assembly.optimizer.state
    theirs = transformers.AutoModelForCausalLM.from_pretrained(outputs["model"], dtype=torch.float32)
    with torch.no_grad():
        assert gap(tuned, theirs(prompt(base)).logits[0]) < EXACT


def test_a_wholly_tuned_model_is_written_bit_for_bit_and_may_be_written_again(base, tmp_path):
    job, assembly = trained(base, tmp_path, adapter="none", dtype=torch.bfloat16)
    for _ in range(2):
        outputs = export(job, assembly, find_source(str(base)), prompt(base))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["model"]
    again = dict(load(outputs["model"]).named_parameters())
    assert all(torch.equal(p, again[name]) for name, p in assembly.model.named_parameters())


def test_an_adapter_on_packed_weights_merges_into_dense_ones(base, tmp_path):
    from satchel.compress.int8 import Int8

    job = toy_job(tmp_path, model=str(base), lr=0.02, merge=True)
    assembly = assemble(job, load(str(base), torch.bfloat16, format=Int8()))
    rows = read_dataset(job, CharTokenizer()).train
    for step in range(8):
        train_step(assembly, rows.batches(rows.step_rows(step, 6, 0, 10**6), 6), 0.02)
    tuned = logits(assembly.model, base)
    outputs = export(job, assembly, find_source(str(base)), prompt(base))
    assert divergence(tuned, logits(load(outputs["model"]), base)) < exporting.DIVERGENCE[torch.bfloat16]


def test_an_untrained_adapter_is_refused_by_name(base, tmp_path):
    job, assembly = trained(base, tmp_path, steps=0)
    with pytest.raises(ModelError, match=r"changes nothing, at model\.layers\.0\.self_attn\.q_proj or any other"):
        export(job, assembly, find_source(str(base)), prompt(base))
    assert not (tmp_path / "out").exists()


def test_a_spoiled_adapter_or_model_is_refused_by_name(base, tmp_path):
    job, assembly = trained(base, tmp_path)
    name, parameter = assembly.parameters[3]
    parameter.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.k_proj: 'default.B_OR' is not finite"):
        export(job, assembly, find_source(str(base)), prompt(base))
    job, assembly = trained(base, tmp_path, adapter="none", steps=1)
    assembly.model.model.norm.weight.data[2] = torch.inf
    with pytest.raises(ModelError, match="model.norm.weight is not finite"):
        export(job, assembly, find_source(str(base)), prompt(base))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("block", [0, 1])
def test_a_merge_that_loses_a_map_names_its_block_and_writes_nothing(base, tmp_path, monkeypatch, block):
    job, assembly = trained(base, tmp_path, steps=20)
    path, place = [pair for pair in adapted(assembly.model) if f"layers.{block}.mlp.down_proj" in pair[0]][0]
    true = exporting.merge_maps

    def careless(model):
        kept = dense_OI(place.base).clone()
        true(model)
        model.get_submodule(path).weight.data.copy_(kept)  # as if the map had been forgotten

    monkeypatch.setattr(exporting, "merge_maps", careless)
    with pytest.raises(ModelError, match=rf"diverges from the adapted one .* they part at model\.layers\.{block},"):
        export(job.replace(merge=True), assembly, find_source(str(base)), prompt(base))
    assert not (tmp_path / "out" / "model").exists()


def test_merging_in_bfloat16_stays_far_inside_the_limit(base, tmp_path):
    _, assembly = trained(base, tmp_path, steps=20, dtype=torch.bfloat16)
    tuned, start = logits(assembly.model, base), logits(load(str(base)), base)
    merge_checked(assembly.model, prompt(base))
    assert not any(isinstance(m, Adapted) for m in assembly.model.modules())
    assert divergence(tuned, logits(assembly.model, base)) < 0.02 * divergence(tuned, start)


def test_a_save_that_writes_other_numbers_names_the_tensor_and_leaves_nothing(base, tmp_path, monkeypatch):
    job, assembly = trained(base, tmp_path, adapter="none", steps=1)

    def careless(decoder, folder, tokenizer_from):
        other = copy.deepcopy(decoder)
        other.layers[1].mlp.up_proj.weight.data[3, 3] += 1
        return save(other, folder, tokenizer_from)

    monkeypatch.setattr(exporting, "save", careless)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: what was written is not"):
        export(job, assembly, find_source(str(base)), prompt(base))
    assert list((tmp_path / "out").iterdir()) == []


def test_merge_refuses_a_folder_in_use_and_an_adapter_that_is_not_there(base, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("")
    with pytest.raises(ModelError, match="exists and is not empty"):
        merge(str(base), tmp_path / "none", tmp_path / "used")
    with pytest.raises((ModelError, UserError), match="none"):
        merge(str(base), tmp_path / "none", tmp_path / "new")
    assert not (tmp_path / "new").exists()
