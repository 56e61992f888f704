import json

import pytest
import torch
from torch import nn

from satchel.adapt import load_peft, save_peft
from satchel.adapt._peft_config import CONFIG, WEIGHTS
from satchel.adapt.dora import Dora
from satchel.adapt.lora import Lora
from satchel.adapt.rslora import RsLora
from satchel.core.errors import ModelError, NoDisk, UserError
from satchel.model.adapters import adapted, adapter_parameters, attach, detach
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.names import house_recipes
from tests.adapt.common import logits
from tests.adapt.toys import stir, tiny_llama
from tests.tolerances import same

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

METHODS = [Lora(rank=4, alpha=8), RsLora(rank=4, alpha=3), Dora(rank=4, alpha=8)]
every_method = pytest.mark.parametrize("method", METHODS, ids=str)


def by_peft(folder, **knobs) -> torch.Tensor:
    """A folder that PEFT wrote, and the logits of the model that it was taken from."""
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]} | knobs))
    model = peft.get_peft_model(tiny_llama(), config)
    stir((n, p) for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(folder)
    return logits(model)


def read_by_peft(folder, base: nn.Module) -> torch.Tensor:
    return logits(peft.PeftModel.from_pretrained(base, folder))


@every_method
@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj"), ("layers.1.*",)], ids=str)
def test_peft_loads_what_is_saved_here_with_the_same_logits(method, targets, tmp_path):
    model = tiny_llama()
    plain = logits(model)
    attach(model, method, torch.Generator().manual_seed(0), targets=targets)
    stir(adapter_parameters(model))
    ours = logits(model)
    save_peft(model, tmp_path / "adapter", base_name="some/model")
    assert not same(ours, plain)
    assert same(read_by_peft(tmp_path / "adapter", tiny_llama()), ours)
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.1\.(self_attn\.[qk]_proj|mlp\.(up|down)_proj)"},
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.down_proj": 6}, "alpha_pattern": {"down_proj": 5}},
        {"layers_to_transform": [1]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"exclude_modules": ["layers.0.self_attn.q_proj"]},
        {"lora_dropout": 0.1},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_what_peft_saved_loads_here_with_the_same_logits(knobs, tmp_path):
    theirs = by_peft(tmp_path, **knobs)
    model = tiny_llama()
    plain = logits(model)
    load_peft(model, tmp_path)
    assert same(logits(model), theirs) and not same(theirs, plain)
    detach(model)
    assert torch.equal(logits(model), plain)


def test_patterns_survive_the_way_through_this_house(tmp_path):
    theirs = by_peft(tmp_path / "a", rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 5})
    model = tiny_llama()
    load_peft(model, tmp_path / "a")
    save_peft(model, tmp_path / "b")
    assert same(read_by_peft(tmp_path / "b", tiny_llama()), theirs)


FAMILIES = {
    "phi3": lambda: transformers.Phi3Config(num_key_value_heads=2, pad_token_id=0, **SMALL),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**SMALL),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=96),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=97, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
    ),
}
SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def pair(family: str) -> tuple[nn.Module, nn.Module]:
    """A model of transformers, and ours with its weights."""
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    state = theirs.state_dict()
    config = ModelConfig.from_hf(theirs.config.to_dict())
    ours = Decoder(config)
    made = {name: r.make([state[s] for s in r.sources]) for name, r in house_recipes(config, state).items()}
    if config.tied:
        made["lm_head.weight"] = made["model.embed_tokens.weight"]
    ours.load_state_dict(made)
    assert same(logits(ours), logits(theirs))
    return ours, theirs


@every_method
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_families_are_saved_exactly_under_their_own_names(family, method, tmp_path):
    ours, theirs = pair(family)
    attach(ours, method, torch.Generator().manual_seed(0))
    stir(adapter_parameters(ours))
    save_peft(ours, tmp_path)
    assert same(read_by_peft(tmp_path, theirs), logits(ours))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_of_fused_families_are_split_exactly_and_fused_again(family, dora, tmp_path):
    ours, theirs = pair(family)
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=dora))
    stir((n, p) for n, p in model.named_parameters() if p.requires_grad)
    model.save_pretrained(tmp_path / "a")
    paths = load_peft(ours, tmp_path / "a")
    assert len(paths) == 2 * (7 if family == "phi3" else 6)
    assert same(logits(ours), logits(model))
    save_peft(ours, tmp_path / "b")
    assert json.loads((tmp_path / "b" / CONFIG).read_text())["r"] == 4
    assert same(read_by_peft(tmp_path / "b", pair(family)[1]), logits(model))


def test_part_of_a_fused_map_may_be_adapted(tmp_path):
    ours, theirs = pair("gpt_neox")
    attach(ours, Lora(rank=4), torch.Generator().manual_seed(0), targets=("q_proj", "v_proj"))
    stir(adapter_parameters(ours))
    save_peft(ours, tmp_path)
    assert same(read_by_peft(tmp_path, theirs), logits(ours))


def refused(folder, complaint: str, model: nn.Module | None = None) -> None:
    model = model or tiny_llama()
    with pytest.raises(ModelError, match=complaint):
        load_peft(model, folder)
    assert not list(adapted(model)) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.*not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"a_key_of_tomorrow": {"x": 1}}, "a_key_of_tomorrow=.*not supported"),
        ({"peft_type": "IA3"}, "type IA3"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base"),
        ({"r": 8}, "rank 8 by adapter_config.json, 4 and 4"),
        ({"use_dora": True}, "asks for"),
        ({"target_modules": ["q_proj", "down_proj", "k_proj"]}, "no tensors for model.layers.0.self_attn.k_proj"),
    ],
    ids=str,
)
def test_configuration_that_cannot_be_kept_is_refused(change, complaint, tmp_path):
    by_peft(tmp_path)
    keys = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(keys | change))
    refused(tmp_path, complaint)


def test_keys_of_newer_versions_at_rest_are_tolerated(tmp_path):
    theirs = by_peft(tmp_path)
    keys = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(keys | {"of_tomorrow": None, "use_tomorrow": False, "more": {}}))
    model = tiny_llama()
    load_peft(model, tmp_path)
    assert same(logits(model), theirs)


def test_adapter_of_another_model_is_refused_by_layer(tmp_path):
    by_peft(tmp_path)
    refused(tmp_path, r"another model: model.layers.0.mlp.down_proj is \[64, 128\] there and \[32, 64\] here", half())
    by_peft(tmp_path)
    shallow = tiny_llama()
    del shallow.model.layers[1]
    refused(tmp_path, "another model: this one has no linear map 'model.layers.1.", shallow)


def half() -> nn.Module:
    config = tiny_llama().config
    config.hidden_size, config.intermediate_size, config.head_dim = 32, 64, 8
    return transformers.LlamaForCausalLM(config)


def test_adapter_that_is_cut_off_or_foreign_is_refused(tmp_path):
    by_peft(tmp_path / "a")
    (tmp_path / "a" / WEIGHTS).write_bytes((tmp_path / "a" / WEIGHTS).read_bytes()[:-100])
    refused(tmp_path / "a", "cut off")
    (tmp_path / "a" / WEIGHTS).unlink()
    refused(tmp_path / "a", f"no {WEIGHTS}")
    (tmp_path / "a" / CONFIG).write_text("{")
    refused(tmp_path / "a", "not a JSON object")
    refused(tmp_path / "b", f"no {CONFIG}")
    by_peft(tmp_path / "c", target_modules=["embed_tokens", "q_proj"])
    refused(tmp_path / "c", "embed_tokens.* is no LoRA")


def test_failed_write_leaves_no_adapter(tmp_path):
    model = tiny_llama()
    attach(model, Lora(rank=2))
    (tmp_path / "file").write_text("")
    with pytest.raises(NoDisk, match="cannot be written"):
        save_peft(model, tmp_path / "file" / "adapter")
    with pytest.raises(UserError, match="no adapter 'other'"):
        save_peft(model, tmp_path, name="other")
    assert not (tmp_path / CONFIG).exists()


def test_saving_again_replaces_the_adapter(tmp_path):
    model = tiny_llama()
    attach(model, Lora(rank=2), torch.Generator().manual_seed(0))
    save_peft(model, tmp_path)
    stir(adapter_parameters(model))
    save_peft(model, tmp_path)
    assert same(read_by_peft(tmp_path, tiny_llama()), logits(model))
