"""Every family gives transformers' logits, counts its parameters, and is written back as transformers reads it."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from satchel.model.config import ModelConfig
from satchel.model.functional import chunked_cross_entropy
from satchel.model.names import hf_recipes, to_house
from tests.model.families import CASES, LONG, SHAPE, YARN, hf_model, our_model, tensors_on_disk
from tests.tolerances import TOLERANCE

TOKENS = torch.randint(2, 101, (2, 23), generator=torch.Generator().manual_seed(0))  # 0 and 1 are padding


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= TOLERANCE[torch.float32] * theirs.abs().max()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = our_model(tmp_path / "theirs")
    expected = theirs(TOKENS).logits
    assert_same_logits(ours(TOKENS), expected)
    assert ours.config.parameters == sum(p.numel() for p in ours.parameters())

    tensors = dict(ours.state_dict())
    recipes = hf_recipes(ours.config, tensors)
    written = {name: r.make([tensors[s] for s in r.sources]).contiguous() for name, r in recipes.items()}
    assert written.keys() == tensors_on_disk(tmp_path / "theirs").keys()
    (tmp_path / "ours").mkdir()
    save_file(written, tmp_path / "ours/model.safetensors", metadata={"format": "pt"})
    transformers.AutoConfig.for_model(**ours.config.to_hf()).save_pretrained(tmp_path / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    assert_same_logits(again(TOKENS).logits, expected)


@pytest.mark.parametrize("case", ["llama", "gemma2", "gemma3", "olmo2", "opt-350m", "gpt_neox", "qwen2_moe", "olmoe"])
def test_gradients_equal_those_of_transformers(case: str, tmp_path: Path) -> None:
    theirs = hf_model(case)
    theirs.save_pretrained(tmp_path)
    ours = our_model(tmp_path)
    targets = TOKENS.roll(-1, 1).flatten()
    torch.nn.functional.cross_entropy(theirs(TOKENS).logits.flatten(0, 1), targets, reduction="sum").backward()
    cap = ours.config.logit_softcap
    head = ours.lm_head.weight
    chunked_cross_entropy(ours.hidden(TOKENS).flatten(0, 1), head, targets, chunk=16, softcap=cap).backward()
    expected = theirs.get_input_embeddings().weight.grad  # passes through every layer, and the head where it is tied
    assert (ours.model.embed_tokens.weight.grad - expected).norm() <= TOLERANCE[torch.float32] * expected.norm()


OLD = {
    "llama": {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "qwen2": {"rope_theta": 1e6, "rope_scaling": YARN},
    "phi3": {"rope_scaling": LONG | {"original_max_position_embeddings": 16}},
    "gemma3_text": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 9e3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "head_dim": 8,
    },
    "gpt_neox": {"rotary_emb_base": 500, "rotary_pct": 0.5},
    "mixtral": {"rope_theta": 3e4, "num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "rope_theta": 2e4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
}


@pytest.mark.parametrize("family", OLD)
def test_configurations_of_old_read_as_transformers_reads_them(family: str) -> None:
    old = SHAPE | {"model_type": family, "pad_token_id": 0, "num_attention_heads": 2} | OLD[family]
    if family == "phi3":
        old |= {"original_max_position_embeddings": 16, "hidden_size": 16}
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(old))).to_dict()
    ours = ModelConfig.from_hf(old)
    assert dataclasses.replace(ModelConfig.from_hf(theirs), source=ours.source, pattern=ours.pattern) == ours
    assert ModelConfig.from_hf(theirs).layer_kinds == ours.layer_kinds


def test_streaming_and_lazy_reading_agree(tmp_path: Path) -> None:
    hf_model("gpt_neox").save_pretrained(tmp_path)
    ours = our_model(tmp_path)
    streamed = dict(p for name, t in tensors_on_disk(tmp_path).items() for p in to_house(ours.config, name, t))
    assert streamed.keys() == ours.state_dict().keys()
    assert all(torch.equal(t, ours.state_dict()[name]) for name, t in streamed.items())
