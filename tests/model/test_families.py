"""Every family gives transformers' logits, counts its parameters, and is written back as transformers reads it."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from satchel.model.names import hf_recipes, to_house
from tests.model.families import CASES, hf_model, our_model, tensors_on_disk
from tests.tolerances import TOLERANCE

TOKENS = torch.randint(0, 101, (2, 23), generator=torch.Generator().manual_seed(0))


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


def test_streaming_and_lazy_reading_agree(tmp_path: Path) -> None:
    hf_model("gpt_neox").save_pretrained(tmp_path)
    ours = our_model(tmp_path)
    streamed = dict(p for name, t in tensors_on_disk(tmp_path).items() for p in to_house(ours.config, name, t))
    assert streamed.keys() == ours.state_dict().keys()
    assert all(torch.equal(t, ours.state_dict()[name]) for name, t in streamed.items())
