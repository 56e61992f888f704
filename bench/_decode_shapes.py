"""GGUF files of random weights in Q4_0, at the shapes of larger models: all layers are the same one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

BLOCK = 32  # weights of a Q4_0 block, 18 bytes: a half-precision scale, then two weights a byte
CONTEXT = 4096


@dataclass(frozen=True)
class Llama:
    """A Llama's shape, of which a file holds some layers."""

    width: int
    hidden: int
    heads: int
    kv_heads: int
    layers: int
    vocabulary: int = 32000

    def write(self, path: Path) -> Path:
        """Write the file, whole or not at all."""
        draft = path.with_suffix(".part")
        out = gguf.GGUFWriter(draft, "llama")
        self._describe(out)
        rng, kv = np.random.default_rng(0), self.kv_heads * self.width // self.heads
        rows = {"attn_q": self.width, "attn_k": kv, "attn_v": kv, "attn_output": self.width}
        rows |= {"ffn_gate": self.hidden, "ffn_up": self.hidden, "ffn_down": self.width}
        inputs = {"ffn_down": self.hidden}
        layer = {name: _blocks(rng, count, inputs.get(name, self.width)) for name, count in rows.items()}
        ones = np.ones(self.width, np.float32)
        for name in ("token_embd", "output"):
            _add(out, name, _blocks(rng, self.vocabulary, self.width))
        for index in range(self.layers):
            for name, blocks in layer.items():
                _add(out, f"blk.{index}.{name}", blocks)
            for name in ("attn_norm", "ffn_norm"):
                out.add_tensor(f"blk.{index}.{name}.weight", ones)
        out.add_tensor("output_norm.weight", ones)
        for finish in (out.write_header_to_file, out.write_kv_data_to_file, out.write_tensors_to_file, out.close):
            finish()
        return draft.replace(path)

    def _describe(self, out: gguf.GGUFWriter) -> None:
        out.add_context_length(CONTEXT)
        out.add_embedding_length(self.width)
        out.add_block_count(self.layers)
        out.add_feed_forward_length(self.hidden)
        out.add_head_count(self.heads)
        out.add_head_count_kv(self.kv_heads)
        out.add_layer_norm_rms_eps(1e-5)
        out.add_rope_freq_base(10000.0)
        out.add_rope_dimension_count(self.width // self.heads)
        out.add_vocab_size(self.vocabulary)
        out.add_tokenizer_model("no_vocab")


def _blocks(rng: np.random.Generator, rows: int, inputs: int) -> np.ndarray:
    """Weights of standard deviation 1 / sqrt(inputs), which keep what flows through them at its size."""
    blocks = rng.integers(0, 256, (rows, inputs // BLOCK, 18), dtype=np.uint8)
    scale = np.full((rows, inputs // BLOCK, 1), 1 / (4.61 * inputs**0.5), np.float16)
    blocks[:, :, :2] = scale.view(np.uint8)
    return blocks.reshape(rows, -1)


def _add(out: gguf.GGUFWriter, name: str, blocks: np.ndarray) -> None:
    out.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
