import gguf
import numpy as np
import pytest
import torch

from satchel.model.encodings import ENCODINGS, PLAIN

QUANTIZED = [name for name in ENCODINGS if name not in PLAIN]


def random_blocks(name: str, count: int, seed: int = 0) -> np.ndarray:
    """Any bytes are a valid block, but for its float16 scales, which are kept finite."""
    encoding = ENCODINGS[name]
    raw = np.random.default_rng(seed).integers(0, 256, (count, encoding.nbytes), dtype=np.uint8)
    scales = {"Q6_K": (209,), "Q4_0": (1,), "Q5_0": (1,), "Q8_0": (1,)}.get(name, (1, 3))
    for byte in scales:
        raw[:, byte] &= 0xBF  # clears the exponent's top bit: no inf, no nan
    return raw


@pytest.mark.parametrize("name", [*QUANTIZED, "F32", "F16", "BF16"])
def test_decoding_equals_the_gguf_package_bit_for_bit(name):
    raw = random_blocks(name, 301) if name in QUANTIZED else np.arange(4096, dtype=np.uint8).reshape(-1, 4) & 0x3F
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[name])
    encoding = ENCODINGS[name]
    found = encoding.decode(torch.from_numpy(raw.reshape(-1, encoding.nbytes))).float().numpy()
    assert np.array_equal(found.reshape(-1), expected.reshape(-1))


@pytest.mark.parametrize("name", QUANTIZED)
def test_block_sizes_are_the_gguf_packages(name):
    sizes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    assert sizes == (ENCODINGS[name].values, ENCODINGS[name].nbytes)
