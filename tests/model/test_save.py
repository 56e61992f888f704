import dataclasses
import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from satchel.adapt.lora import Lora
from satchel.compress.int8 import Int8
from satchel.core.errors import ModelError, NoDisk
from satchel.model import save as saving
from satchel.model.adapters import attach
from satchel.model.decoder import Decoder
from satchel.model.linear import dense_OI, linears
from satchel.model.load import load
from satchel.model.save import save
from satchel.model.source import find_source, load_tokenizer
from tests.model.families import CASES, hf_model
from tests.tolerances import TOLERANCE

TOKENS_BT = torch.arange(24).view(2, 12) * 7 % 101


def write(case: str, folder: Path) -> torch.nn.Module:
    """A toy model of transformers, saved by transformers."""
    model = hf_model(case)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_load_and_save_keep_every_familys_logits(case, tmp_path):
    theirs = write(case, tmp_path / "theirs")
    expected = theirs(TOKENS_BT).logits
    ours = load(str(tmp_path / "theirs"), dtype=torch.float32)
    found = ours(TOKENS_BT)
    assert (found - expected).abs().max() <= 10 * TOLERANCE[torch.float32] * expected.abs().max()
    save(ours, tmp_path / "ours")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(again.eval()(TOKENS_BT).logits, expected)


@pytest.fixture
def small(tmp_path) -> Decoder:
    write("llama-biased", tmp_path / "theirs")
    return load(str(tmp_path / "theirs"))


def test_shards_hold_every_tensor_once_and_load_alike(small, tmp_path):
    save(small, tmp_path / "ours", shard_bytes=20_000)
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
    assert len(files) > 3 and {path.name for path in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in small.parameters())
    again = load(str(tmp_path / "ours"))
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), again.parameters(), strict=True))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert theirs.dtype == torch.bfloat16


def test_a_folder_that_holds_something_is_left_alone(small, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours/notes.txt").write_text("mine")
    with pytest.raises(ModelError, match="exists and is not empty"):
        save(small, tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_filled(small, tmp_path):
    (tmp_path / "ours").mkdir()
    save(small, tmp_path / "ours")
    assert (tmp_path / "ours/model.safetensors").exists()


def test_too_little_disk_is_refused_before_anything_is_written(small, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(NoDisk, match=r"no disk left: needs .*MiB, 1000 B free"):
        save(small, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_a_disk_that_fills_up_leaves_nothing_behind(small, tmp_path, monkeypatch):
    def full(path: Path, tensors: list) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "write_safetensors", full)
    with pytest.raises(NoDisk, match="ours: no disk left; .*nothing was left behind"):
        save(small, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_what_a_killed_save_left_is_swept(small, tmp_path):
    (tmp_path / ".ours.partial").mkdir()
    (tmp_path / ".ours.partial/model.safetensors").write_bytes(b"half of it")
    save(small, tmp_path / "ours")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs"]


def test_a_folder_that_may_not_be_written_is_told_without_a_traceback(small, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NoDisk, match="cannot be written"):
        save(small, tmp_path / "file" / "ours")


def test_adapters_must_be_merged_first(small, tmp_path):
    attach(small, Lora(rank=2))
    with pytest.raises(ModelError, match=r"adapters are still around 21 matrices.*merge"):
        save(small, tmp_path / "ours")


@pytest.mark.parametrize("case", ["llama-biased", "phi3"])
def test_packed_matrices_are_written_dense(case, tmp_path):
    write(case, tmp_path / "theirs")
    packed = load(str(tmp_path / "theirs"), dtype=torch.float32, format=Int8())
    save(packed, tmp_path / "ours")
    dense = load(str(tmp_path / "ours"), dtype=torch.float32)
    for path, module in linears(dense).items():
        assert torch.equal(module.weight, dense_OI(packed.get_submodule(path)))
        if module.bias is not None:
            assert torch.equal(module.bias, packed.get_submodule(path).bias)


def test_the_tokenizer_goes_along_and_code_does_not(small, tmp_path):
    demo = find_source("demo")
    load_tokenizer(demo).save(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    config |= {"vocab_size": 49152, "auto_map": {"AutoModel": "modeling.Evil"}}
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    (tmp_path / "theirs/modeling.py").write_text("raise SystemExit")
    source = dataclasses.replace(find_source("demo"), kind="folder", path=tmp_path / "theirs")
    save(small, tmp_path / "ours", tokenizer_from=source)
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "config.json"} and "modeling.py" not in names
    save(small, tmp_path / "again", tokenizer_from=demo)
    assert json.loads((tmp_path / "again/generation_config.json").read_text())["eos_token_id"] == [2]
    for folder in ("ours", "again"):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        assert theirs("Hi 1984")["input_ids"] == load_tokenizer(demo).encode("Hi 1984")
        assert "auto_map" not in json.loads((tmp_path / folder / "config.json").read_text())


def test_every_file_is_on_the_disk_before_the_folder_takes_its_place(small, tmp_path, monkeypatch):
    flushed, held = [], []
    monkeypatch.setattr(saving, "sync", lambda path: flushed.append(path.name))
    monkeypatch.setattr(saving.os, "replace", lambda draft, target: held.extend(flushed) or draft.rename(target))
    save(small, tmp_path / "ours")
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert names < set(held) and len(held) == len(names) + 1  # and the draft folder itself
    assert flushed[-1] == tmp_path.name
