"""Every adapter on every format of the frozen weights: trained, saved, loaded, merged, and the merged model saved."""

import pytest
import torch

from satchel.adapt import load_peft, save_peft
from satchel.adapt.dora import Dora
from satchel.adapt.lora import Lora
from satchel.adapt.rslora import RsLora
from satchel.compress.int4 import Int4
from satchel.compress.int8 import Int8
from satchel.compress.nf4 import Nf4
from satchel.model.adapters import adapter_parameters, attach, detach
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.linear import linears
from satchel.model.load import load
from satchel.model.merge import merge
from satchel.model.save import save
from tests.tolerances import TOLERANCE

CONFIG = ModelConfig.from_hf(
    {
        "model_type": "qwen2",  # biases on q, k and v
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
)
TOKENS = torch.randint(96, (1, 24), generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    decoder = Decoder(CONFIG)
    decoder.init_weights(torch.Generator().manual_seed(1))
    return save(decoder, tmp_path_factory.mktemp("base") / "model")


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS)


def train(model, steps=20):
    optimizer, losses = torch.optim.Adam([p for _, p in adapter_parameters(model)], lr=1e-2), []
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model.train()(TOKENS)[0, :-1].float(), TOKENS[0, 1:])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def near(ours, theirs, tolerance):
    return bool((ours - theirs).norm() <= tolerance * theirs.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", [None, Int8(), Nf4(), Int4()], ids=str)
@pytest.mark.parametrize("method", [Lora(rank=4), RsLora(rank=4), Dora(rank=4)], ids=str)
def test_trains_and_survives_save_load_merge_and_export(method, format, dtype, folder, tmp_path):
    model = load(str(folder), dtype=dtype, format=format)
    base = logits(model)
    attach(model, method, torch.Generator().manual_seed(0))
    losses = train(model)
    assert losses[-1] < 0.95 * losses[0]
    tuned = logits(model)
    save_peft(model, tmp_path / "adapter")

    again = load(str(folder), dtype=dtype, format=format)
    assert len(load_peft(again, tmp_path / "adapter")) == len(linears(again)) == 14
    assert torch.equal(logits(again), tuned)
    merge(again)
    assert near(logits(again), tuned, TOLERANCE[dtype])
    save(again, tmp_path / "merged")
    assert torch.equal(logits(load(str(tmp_path / "merged"), dtype=dtype)), logits(again))

    detach(model)
    assert torch.equal(logits(model), base) and not near(base, tuned, 0.1)
