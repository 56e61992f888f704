import pytest
import torch

from satchel.core.errors import UserError
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.run import generate as module
from satchel.run.generate import generate
from tests.run.toys import CharTokenizer

LLAMA = {
    "model_type": "llama",
    "vocab_size": 132,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}


class Chars(CharTokenizer):
    """The toy tokenizer with what generation asks of it beside."""

    stop_ids = (CharTokenizer.eos_id,)

    def encode(self, text, special=False):
        return super().encode(text)

    def decode(self, ids, skip_special=True):
        return super().decode(ids)

    def chat(self, messages, generate=False):
        return "".join(f"{m['role'][0]}{m['content']}" for m in messages) + "a" * generate


@pytest.fixture(scope="module")
def model():
    decoder = Decoder(ModelConfig.from_hf(LLAMA))
    decoder.init_weights(torch.Generator().manual_seed(0))
    return decoder


def greedily(model, ids, count):
    """One forward pass over everything for each token."""
    ids = list(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[-count:]


def test_what_is_said_is_the_models_likeliest(model):
    said = greedily(model, Chars().encode("some prompt"), 12)
    assert generate(model, Chars(), "some prompt", max_tokens=12, temperature=0) == Chars().decode(said)


def test_a_prompt_fed_in_parts_continues_as_a_whole_one(model, monkeypatch):
    whole = generate(model, Chars(), "some prompt of words", max_tokens=8, temperature=0)
    monkeypatch.setattr(module, "PREFILL", 3)
    assert generate(model, Chars(), "some prompt of words", max_tokens=8, temperature=0) == whole


def test_a_seed_makes_the_same_text_and_another_seed_another(model):
    texts = [generate(model, Chars(), "abc", max_tokens=20, temperature=1.5, top_p=1.0, seed=s) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_pieces_add_up_to_the_text(model):
    pieces = []
    text = generate(model, Chars(), [{"role": "user", "content": "hi"}], max_tokens=9, on_text=pieces.append)
    assert "".join(pieces) == text and all(pieces)


def test_generation_ends_at_a_stop_token_and_does_not_say_it(model):
    said = greedily(model, Chars().encode("abc"), 6)

    class Stopping(Chars):
        stop_ids = (said[3],)

    expected = Chars().decode(said[: said.index(said[3])])
    assert generate(model, Stopping(), "abc", max_tokens=6, temperature=0) == expected


def test_generation_ends_at_the_models_context(model):
    said = generate(model, Chars(), "x" * 60, max_tokens=512, temperature=0)
    assert said == Chars().decode(greedily(model, Chars().encode("x" * 60), 4))


def test_dropout_rests_while_generating_and_works_again_after(model):
    model.train()
    generate(model, Chars(), "abc", max_tokens=1)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [({"max_tokens": 0}, "max_tokens=0"), ({"temperature": -1}, "temperature=-1"), ({"top_p": 0}, "top_p=0")],
)
def test_settings_out_of_range_are_refused(model, settings, complaint):
    with pytest.raises(UserError, match=complaint):
        generate(model, Chars(), "abc", **settings)


@pytest.mark.parametrize("prompt", ["", "x" * 64])
def test_a_prompt_that_the_model_cannot_take_is_refused(model, prompt):
    with pytest.raises(UserError, match="this model takes 1 to 63"):
        generate(model, Chars(), prompt)
