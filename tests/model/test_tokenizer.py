import json
from pydoc_data.topics import topics

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from satchel.core.errors import ModelError
from satchel.model.gguf import read_gguf
from satchel.model.gguf_tokenizer import build_tokenizer
from satchel.model.source import demo_path, load_tokenizer
from satchel.model.tokenizer import Tokenizer, folder_tokenizer, gguf_tokenizer

TEXT = "Hello,  world! naïve café 東京 🎉\n\tdef f(x):\n        return x**2  # 1984\r\n\r\n <|im_end|> it's 'S I'LL"
# As transformers encodes it (see the slow test), with SmolLM2's rule: digits one by one, then GPT-2's words.
TEXT_IDS = [
    19556,
    28,
    216,
    905,
    17,
    15486,
    46494,
    37366,
    17097,
    247,
    126,
    16736,
    122,
    15107,
    232,
    227,
    198,
    197,
    1604,
    275,
    24,
    104,
    727,
    448,
    1003,
    1792,
    828,
    34,
    216,
    907,
    216,
    33,
    41,
    40,
    36,
    18682,
    216,
    2,
    357,
    506,
    637,
    67,
    339,
    23,
    16421,
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello there"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long"},
]


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return load_tokenizer("demo")


def test_text_survives_the_round_trip(demo):
    assert demo.decode(demo.encode(TEXT)) == TEXT
    assert demo.encode_batch([TEXT, "a"]) == [demo.encode(TEXT), demo.encode("a")]


def test_ids_are_the_recorded_ones(demo):
    assert demo.encode(TEXT) == TEXT_IDS
    assert demo.encode("   2 1984") == demo.encode("   ") + demo.encode("2") + demo.encode(" ") + [
        i for digit in "1984" for i in demo.encode(digit)
    ]


def test_special_tokens_are_found_in_text_and_named(demo):
    assert demo.encode("a<|im_end|>b")[1] == demo.eos_id == 2
    assert demo.bos_id == 1 and demo.stop_ids == (2,)
    assert demo.decode([1, 2, demo.encode("x")[0]], skip_special=True) == "x"


def test_the_assistants_tokens_are_its_words_and_its_end_of_turn(demo):
    ids, mine = demo.chat_tokens(MESSAGES)
    assert ids == demo.encode(demo.chat(MESSAGES))
    said = demo.decode([i for i, m in zip(ids, mine, strict=True) if m])
    assert said == "Hello there<|im_end|>So long<|im_end|>"


def test_a_saved_tokenizer_is_the_same_here_and_in_transformers(demo, tmp_path):
    demo.save(tmp_path)
    again, theirs = folder_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert again.size == demo.size == len(theirs) == 49152
    assert again.encode(TEXT) == demo.encode(TEXT) == theirs(TEXT, add_special_tokens=False)["input_ids"]
    assert theirs.eos_token_id == demo.eos_id and theirs.bos_token_id == demo.bos_id
    text = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == demo.chat(MESSAGES, generate=True) == again.chat(MESSAGES, generate=True)


@pytest.mark.slow
def test_ids_equal_transformers_reading_of_the_same_gguf(demo):
    """But for digits after spaces: transformers knows no rule 'smollm' and takes GPT-2's, which the model was not
    trained with."""

    path = demo_path()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    lines = [line for text in topics.values() for line in text.splitlines()] + [TEXT]
    plain = [line for line in lines if not any(c.isdigit() for c in line)]
    assert demo.encode_batch(plain) == theirs(plain, add_special_tokens=False)["input_ids"]
    rule = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(rule)
    assert demo.encode_batch(lines) == theirs(lines, add_special_tokens=False)["input_ids"]


def sentencepiece_gguf(path, architecture: str):
    """A GGUF file with a small SentencePiece vocabulary: letters, bytes, and words with scores."""
    words = ["\u2581the", "\u2581of", "ing", "\u2581a", "th", "he", "in", "\u2581t", "er", "an", "\u2581\u2581"]
    letters = list("\u2581abcdefghijklmnopqrstuvwxyz.,!")
    control = ["<pad>", "<eos>", "<bos>", "<unk>"] if architecture.startswith("gemma") else ["<unk>", "<s>", "</s>"]
    octets = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = control + octets + sorted(words, key=len) + letters
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * (len(control) + 256) + [-float(i) for i in range(len(words) + len(letters))])
    writer.add_token_types([3] * len(control) + [6] * 256 + [1] * (len(words) + len(letters)))
    writer.add_bos_token_id(tokens.index(control[-2] if len(control) == 4 else "<s>"))
    writer.add_eos_token_id(tokens.index(control[1] if len(control) == 4 else "</s>"))
    writer.add_unk_token_id(tokens.index("<unk>"))
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2"])
def test_sentencepiece_ids_equal_transformers(architecture, tmp_path):

    sentencepiece_gguf(tmp_path / "t.gguf", architecture)
    ours = gguf_tokenizer(read_gguf(tmp_path / "t.gguf").metadata)

    theirs = convert_gguf_tokenizer(*get_gguf_tokenizer(str(tmp_path / "t.gguf"))[:2])[0]
    for text in ["the other thing", " of  an inner  the.", "Ünder 東", "", " ", "a</s>the <eos> b"]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text), skip_special_tokens=False)
    assert ours.encode("the", special=True)[0] == ours.bos_id


def test_a_folder_without_tokenizer_or_with_a_damaged_one_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.json; make it with"):
        folder_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="damaged"):
        folder_tokenizer(tmp_path)


def test_folder_settings_name_special_tokens_stops_and_template(tmp_path):
    Backend(BPE(vocab={"a": 0, "</s>": 1, "<end>": 2}, merges=[])).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    config = {"eos_token": {"content": "</s>"}, "chat_template": [{"name": "default", "template": "hi"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = folder_tokenizer(tmp_path)
    assert tokenizer.stop_ids == (1, 2) and tokenizer.bos_id is None and tokenizer.chat([]) == "hi"
    (tmp_path / "chat_template.jinja").write_text("ho")
    assert folder_tokenizer(tmp_path).chat([]) == "ho"


def test_an_unknown_word_rule_names_the_way_out(demo):

    metadata = read_gguf(demo_path()).metadata | {"tokenizer.ggml.pre": "smollm9"}
    with pytest.raises(ModelError, match=r"'smollm9'.*did you mean 'smollm'.*tokenizer\.json"):
        build_tokenizer(metadata)
