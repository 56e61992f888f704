import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from satchel.core.errors import ModelError
from satchel.model.gguf import read_gguf
from satchel.model.stored import Part, Reader


@pytest.fixture
def small(tmp_path) -> tuple[Path, dict[str, np.ndarray]]:
    """A GGUF file with metadata of every kind, a float32 tensor and a quantized one, written by the gguf package."""
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_float32("llama.rope.freq_base", 1e5)
    writer.add_bool("flag", True)
    writer.add_array("names", ["a", "ü", ""])
    writer.add_array("numbers", [1, 2, 3])
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((5, 64), dtype=np.float32)
    packed = gguf.quantize(rng.standard_normal((700, 64), dtype=np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("plain", plain)
    writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, {"plain": plain, "packed": gguf.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)}


def test_metadata_and_tensors_come_back_as_they_were_written(small):
    path, expected = small
    file = read_gguf(path)
    assert file.metadata["general.architecture"] == "llama"
    assert file.metadata["names"] == ["a", "ü", ""] and file.metadata["numbers"] == [1, 2, 3]
    assert file.metadata["flag"] is True and file.metadata["llama.rope.freq_base"] == 1e5
    with Reader(file.tensors) as reader:
        for name, array in expected.items():
            out = torch.empty(array.shape)
            reader.read(Part(name), out)
            assert torch.equal(out, torch.from_numpy(array))


def test_reading_fills_strided_views_and_parts(small):
    path, expected = small
    packed = torch.from_numpy(expected["packed"])
    with Reader(read_gguf(path).tensors) as reader:
        transposed = torch.empty(64, 700, dtype=torch.bfloat16)
        reader.read(Part("packed", into=lambda out: out.T), transposed)
        assert torch.equal(transposed, packed.T.bfloat16())
        rows = torch.empty(33, 64)
        reader.read(Part("packed", first=100 * 64), rows)
        assert torch.equal(rows, packed[100:133])
        every_third = torch.empty(233, 64)
        reader.read(Part("packed", shift=-1.0, make=lambda whole: whole[1::3]), every_third)
        assert torch.equal(every_third, packed[1::3] - 1)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9, 0.999])
def test_a_file_cut_off_anywhere_is_refused(small, share):
    whole = small[0].read_bytes()
    small[0].write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelError, match="cut off"):
        read_gguf(small[0])


def test_damage_in_the_header_is_an_error_of_ours(small):
    whole = bytearray(small[0].read_bytes())
    rng = np.random.default_rng(1)
    header = whole.index(b"packed") + 64
    refused = 0
    for at in rng.integers(0, header, 200):
        damaged = whole.copy()
        damaged[at] ^= 0xFF
        small[0].write_bytes(damaged)
        try:
            read_gguf(small[0])
        except ModelError:
            refused += 1
    assert refused > 50  # the rest hit bytes that say nothing wrong: a key's letters, a value


def test_other_files_and_versions_are_named(tmp_path):
    other = tmp_path / "model.gguf"
    other.write_bytes(b"PK\x03\x04 some zip file")
    with pytest.raises(ModelError, match="not a GGUF file"):
        read_gguf(other)
    other.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ModelError, match="version 1"):
        read_gguf(other)


def test_a_tensor_type_that_cannot_be_decoded_names_the_types_that_can(small):
    whole = bytearray(small[0].read_bytes())
    at = whole.index(b"packed") + len("packed") + 4 + 16  # name, dimension count, two dimensions
    assert struct.unpack_from("<I", whole, at) == (2,)
    struct.pack_into("<I", whole, at, 17)
    small[0].write_bytes(whole)
    with pytest.raises(ModelError, match=r"IQ2_XS.*Q4_K"):
        read_gguf(small[0])
