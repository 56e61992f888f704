"""Text to token ids and back, from tokenizer.json or from the metadata of a GGUF file.

A thin layer over the `tokenizers` library that knows the model's special tokens and its chat template, and can write
itself as the files that transformers reads. Nothing from a model folder is executed.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from satchel.core.errors import ModelError
from satchel.model.chat import ChatTemplate, Messages
from satchel.model.gguf_tokenizer import build_tokenizer, token_of

ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}  # ours to GGUF's


@dataclass(frozen=True)
class Tokenizer:
    """Encodes and decodes. Special tokens that stand in a text are found there, as transformers does."""

    backend: tokenizers.Tokenizer
    size: int  # one more than the highest id
    special: Mapping[str, str] = field(default_factory=dict)  # 'bos_token', 'eos_token', ... to their text
    chat_template: str | None = None
    more_stops: tuple[int, ...] = ()  # ids, beside eos, that the model's generation settings end a turn with
    settings: Mapping[str, Any] = field(default_factory=dict)  # the rest of tokenizer_config.json

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Token ids of a text; with `special`, framed as the model expects a whole text (a bos token, for most)."""
        return self.backend.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Token ids of many texts at once, on all cores."""
        return [encoded.ids for encoded in self.backend.encode_batch_fast(list(texts), add_special_tokens=special)]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of token ids; `skip_special` leaves control tokens out."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    @cached_property
    def longest(self) -> int:
        """Characters of the longest token: a text of so many times as many has at least so many tokens."""
        return max(map(len, self.backend.get_vocab(with_added_tokens=True)), default=1)

    @property
    def bos_id(self) -> int | None:
        """The token before a text, if the model has one."""
        return self._id("bos_token")

    @property
    def eos_id(self) -> int | None:
        """The token after a text or a turn, if the model has one."""
        return self._id("eos_token")

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Every id that ends the model's turn."""
        eos = () if self.eos_id is None else (self.eos_id,)
        return eos + tuple(i for i in self.more_stops if i not in eos)

    def _id(self, role: str) -> int | None:
        return self.backend.token_to_id(self.special[role]) if role in self.special else None

    def chat(self, messages: Messages, generate: bool = False, tools: Messages | None = None) -> str:
        """The text that the model reads for these messages; `generate` opens the assistant's next turn."""
        return self._template.render(messages, generate, tools)

    def chat_tokens(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """Token ids of a conversation, and which of them the assistant wrote, its end-of-turn token included.

        ModelError if there is no template, if it refuses the messages, or if it rewrites earlier turns.
        """
        ends = [t.content for t in self.backend.get_added_tokens_decoder().values() if t.special]
        text, spans = self._template.spans(messages, ends)
        encoded = self.backend.encode(text, add_special_tokens=False)
        return encoded.ids, [any(a <= start < b for a, b in spans) for start, _ in encoded.offsets]

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise ModelError(
                "this model has no chat template; use prompt/completion or plain text records, or a model tuned to chat"
            )
        return ChatTemplate(self.chat_template, self.special)

    def key(self) -> str:
        """A hash of all that decides how a text is encoded."""
        spelled = self.backend.to_str() + json.dumps(dict(self.special), sort_keys=True)
        return hashlib.blake2b(spelled.encode(), digest_size=16).hexdigest()

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as transformers reads them."""
        self.backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config |= dict(self.settings) | dict(self.special)
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer in a GGUF file's metadata."""
    special = {role: token_of(metadata, gguf) for role, gguf in ROLES.items()}
    turn_end = metadata.get("tokenizer.ggml.eot_token_id")
    return Tokenizer(
        build_tokenizer(metadata),
        len(metadata["tokenizer.ggml.tokens"]),
        {role: token for role, token in special.items() if token is not None},
        metadata.get("tokenizer.chat_template"),
        () if turn_end is None else (turn_end,),
    )


def folder_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a Hugging Face folder. ModelError if there is no tokenizer.json, or it is damaged."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise ModelError(
            f'{folder}: no tokenizer.json; make it with: python -c "from transformers import AutoTokenizer as A; '
            f"A.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong
        raise ModelError(f"{path}: damaged ({error}); fetch the file again") from error
    backend.no_truncation()
    backend.no_padding()
    config = read_json(folder / "tokenizer_config.json")
    special = read_json(folder / "special_tokens_map.json") | config
    return Tokenizer(
        backend,
        max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        {role: _content(special[role]) for role in ROLES if special.get(role)},
        _folder_template(folder, config),
        _stops(read_json(folder / "generation_config.json")),
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file; {} if there is no file. ModelError if it is anything else."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: no JSON ({error}); fetch the file again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object was expected; fetch the file again")
    return value


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else token["content"]


def _folder_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    template = read_json(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(template, list):  # several, by name
        return {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _stops(generation: Mapping[str, Any]) -> tuple[int, ...]:
    eos = generation.get("eos_token_id")
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
