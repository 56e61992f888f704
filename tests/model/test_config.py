"""Configurations are read as written, refuse contradictions, and are written back word for word."""

import dataclasses

import pytest

from satchel.core.errors import ModelError, UnknownName
from satchel.model.config import ModelConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA3 = LLAMA | {"model_type": "gemma3_text", "num_hidden_layers": 7, "head_dim": 8, "sliding_window": 4}


def test_a_configuration_is_written_back_word_for_word() -> None:
    assert ModelConfig.from_hf(LLAMA | {"eos_token_id": [1, 2]}).to_hf() == LLAMA | {"eos_token_id": [1, 2]}


def test_fewer_layers_keep_the_kinds_of_the_first() -> None:
    config = ModelConfig.from_hf(GEMMA3)
    cut = dataclasses.replace(config, layers=2)
    assert [kind.window for kind in config.layer_kinds] == [4, 4, 4, 4, 4, None, 4]
    assert cut.layer_kinds == config.layer_kinds[:2] and cut.to_hf()["num_hidden_layers"] == 2
    assert len(set(config.layer_kinds)) == 2


def test_rope_of_both_layouts_reads_the_same() -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = ModelConfig.from_hf(LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"} | scaling})
    new = ModelConfig.from_hf(LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5} | scaling})
    assert old.pattern == new.pattern and old.pattern[0].rope.theta == 5e5


def test_an_unknown_architecture_names_the_nearest() -> None:
    with pytest.raises(ModelError, match="'lama' is not supported; did you mean 'llama'?"):
        ModelConfig.from_hf(LLAMA | {"model_type": "lama"})


def test_an_unknown_rope_scaling_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="did you mean 'linear'"):
        ModelConfig.from_hf(LLAMA | {"rope_scaling": {"type": "lineal", "factor": 2.0}})


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ModelError, match="'hidden_size'"):
        ModelConfig.from_hf({k: v for k, v in LLAMA.items() if k != "hidden_size"})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_key_value_heads": 4}, "6 heads do not divide among 4 kv heads"),
        ({"hidden_act": "sillu"}, "did you mean 'silu'"),
        ({"vocab_size": 0}, "vocab=0 is below 1"),
        ({"head_dim": 7}, "pairs of dimensions"),
        ({"rope_scaling": {"type": "linear"}}, "has no 'factor'"),
        ({"model_type": "mistral", "sliding_window": 0}, "below 1 token"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "1 layer_types for 3 layers"),
    ],
)
def test_contradictions_are_refused(change: dict, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        ModelConfig.from_hf(LLAMA | change)
