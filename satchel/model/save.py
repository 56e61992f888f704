"""A decoder as a Hugging Face folder that transformers loads with identical logits.

Tensors are made and written one at a time, so that no second copy of the model exists. Everything is written beside
the folder first and renamed at the end: the folder is whole, or it is not there.
"""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from satchel.core.disk import require_room, writing
from satchel.core.errors import ModelError
from satchel.model.adapters import Adapted
from satchel.model.config import ModelConfig
from satchel.model.decoder import Decoder
from satchel.model.disk import sync
from satchel.model.linear import dense_OI, dtype_of, is_linear
from satchel.model.names import Recipe, hf_recipes
from satchel.model.safetensors_io import Outgoing, write_safetensors
from satchel.model.source import Source, load_tokenizer

SHARD_BYTES = 5 * 10**9
SPARE_BYTES = 64 * 2**20  # for headers, tokenizer and the file system's own
COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
CLASSES = {  # model_type to the class that transformers loads
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "opt": "OPTForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}


def save(
    decoder: Decoder, folder: str | Path, tokenizer_from: Source | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write config, weights and, from the model's source, tokenizer and generation settings; gives the folder.

    ModelError, with nothing written, if the folder exists and is not empty, the disk has no room, or the decoder still
    has adapters around its matrices. Packed matrices are written dense.
    """
    tensors = outgoing(decoder)
    with new_folder(Path(folder), sum(tensor.nbytes for tensor in tensors)) as partial:
        _write_weights(partial, tensors, shard_bytes)
        _write_json(partial / "config.json", _config(decoder.config, tensors))
        if tokenizer_from is not None:
            _write_companions(partial, tokenizer_from)
    return Path(folder)


def outgoing(decoder: Decoder) -> list[Outgoing]:
    """Every tensor of the folder, in the order of the model. Makes none yet; under fake tensors, a rehearsal."""
    adapted = [path for path, module in decoder.named_modules() if isinstance(module, Adapted)]
    if adapted:
        raise ModelError(f"adapters are still around {len(adapted)} matrices, first {adapted[0]}; merge or detach them")
    shells = dict(Decoder(decoder.config, device="meta").named_parameters())
    return [_outgoing(name, recipe, decoder, shells) for name, recipe in hf_recipes(decoder.config, shells).items()]


def _outgoing(name: str, recipe: Recipe, decoder: Decoder, shells: dict[str, nn.Parameter]) -> Outgoing:
    dtype = dtype_of(decoder.get_submodule(recipe.sources[0].rpartition(".")[0]))
    shape = tuple(recipe.make([shells[source] for source in recipe.sources]).shape)
    return Outgoing(name, shape, dtype, lambda: recipe.make([_tensor(decoder, s) for s in recipe.sources]))


def _tensor(decoder: Decoder, name: str) -> Tensor:
    """A parameter by name; the matrix of a packed map is unpacked, its bias is in the dtype of the matrix."""
    path, _, kind = name.rpartition(".")
    module = decoder.get_submodule(path)
    if kind == "weight" and is_linear(module):
        return dense_OI(module)
    return getattr(module, kind).detach()


@contextmanager
def new_folder(folder: Path, nbytes: int) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when the block ends well, and vanishes when it does not.

    ModelError if `folder` exists and is not empty; NoDisk if the disk lacks room for `nbytes`, before or while writing,
    or refuses. What a killed process left of the same folder is swept.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"{folder} exists and is not empty; give another folder, or remove this one")
    with writing(folder, "; nothing was left behind"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        require_room(folder.parent, nbytes + SPARE_BYTES)
        partial.mkdir()
        try:
            yield partial
            for path in (*partial.iterdir(), partial):
                sync(path)
            os.replace(partial, folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _write_weights(folder: Path, tensors: Sequence[Outgoing], shard_bytes: int) -> None:
    shards = _shards(tensors, shard_bytes)
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard)
    files = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors)}, "weight_map": files}
    _write_json(folder / "model.safetensors.index.json", index)


def _shards(tensors: Sequence[Outgoing], shard_bytes: int) -> list[list[Outgoing]]:
    """Runs of tensors of at most `shard_bytes` each, or of one tensor that is larger."""
    shards: list[list[Outgoing]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def _config(config: ModelConfig, tensors: Sequence[Outgoing]) -> dict[str, Any]:
    hf = config.to_hf()
    for foreign in ("auto_map", "quantization_config", "_name_or_path"):  # code, a packing, a path of another machine
        hf.pop(foreign, None)
    dtype = str(max(tensors, key=lambda tensor: tensor.nbytes).dtype).removeprefix("torch.")
    own = {"architectures": [CLASSES[config.family]], "model_type": config.family}
    return hf | own | {"dtype": dtype, "torch_dtype": dtype}  # the second is what transformers 4 reads


def _write_companions(folder: Path, source: Source) -> None:
    if source.kind == "folder":
        for name in COPIED:
            if (source.path / name).exists():
                shutil.copyfile(source.path / name, folder / name)
        return
    tokenizer = load_tokenizer(source)
    tokenizer.save(folder)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.stop_ids) or None}
    _write_json(folder / "generation_config.json", {name: value for name, value in ids.items() if value is not None})


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
