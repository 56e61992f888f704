"""A tokenizer of one token a character and a decoder of two narrow layers: small enough to reason about in a test."""

import json

import torch

from satchel.core.job import PretrainJob, TuneJob
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder

END, USER, ASSISTANT = 1, 2, 3
FIRST = 4  # of the characters
VOCABULARY = 132


class CharTokenizer:
    """`encode("a")` is one id; a chat is role id, characters, end; the assistant's characters and end are learnt."""

    eos_id = END
    size = VOCABULARY

    def key(self):
        return "one id a character"

    def encode_batch(self, texts, special=False):
        return [self.encode(text) for text in texts]

    def encode(self, text, special=False):
        return [FIRST + min(ord(c), 127) for c in text]

    def decode(self, ids):
        return "".join(chr(i - FIRST) for i in ids if i >= FIRST)

    def chat_tokens(self, messages):
        ids, learnt = [], []
        for message in messages:
            said, is_assistant = self.encode(message["content"]), message["role"] == "assistant"
            ids += [ASSISTANT if is_assistant else USER, *said, END]
            learnt += [False] + [is_assistant] * (len(said) + 1)
        return ids, learnt


def toy_decoder(dtype=torch.float32, **changes):
    """Random weights, the same each time."""
    sizes = {"vocab": VOCABULARY, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8, "hidden": 48}
    decoder = Decoder(ModelConfig(family="llama", context=512, **({"tied": True} | sizes | changes)), dtype)
    decoder.init_weights(torch.Generator().manual_seed(7), std=0.1)
    return decoder


def toy_job(folder, **changes):
    """A job of a few short steps on `folder/data.jsonl`, which is written if it is not there."""
    data = folder / "data.jsonl"
    if not data.exists():
        lines = [f"record {i}: {'abc' * (i % 9)} is {i * i % 17}" for i in range(60)]
        data.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    basics = {"model": "toy", "data": str(data), "out": str(folder / "out"), "dtype": "fp32", "eval_share": 0.1}
    sizes = {"context": 48, "batch": 6, "micro_batch": 6, "steps": 6, "lr": 0.01, "adapter": "lora:rank=4"}
    return TuneJob(**(basics | sizes | changes))


def toy_text(path, count=60, word="abc"):
    """A .jsonl file of short texts, written if it is not there; its path as a string."""
    if not path.exists():
        lines = [f"text {i}: {word * (i % 9)} is {i * i % 17}" for i in range(count)]
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


def toy_pretraining(folder, **changes):
    """A job of a few short steps on two sources of text, a third of it from the smaller one."""
    data = (toy_text(folder / "large.jsonl") + ":2", toy_text(folder / "small.jsonl", 20, "xyz") + ":1")
    basics = {"model": "toy", "data": data, "out": str(folder / "out"), "dtype": "fp32", "eval_share": 0.1}
    sizes = {"context": 48, "batch": 6, "micro_batch": 6, "steps": 6, "lr": 0.01}
    return PretrainJob(**(basics | sizes | changes))
