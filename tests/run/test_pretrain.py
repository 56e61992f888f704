"""Pre-training from end to end: from random weights to a model, and on from it on other text."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import satchel
from bench._toy import toy
from satchel.core.errors import ModelError, UserError
from satchel.core.job import PretrainJob
from satchel.model.load import draw
from satchel.model.source import find_source
from satchel.run.assemble import assemble
from satchel.run.metrics import read_metrics
from satchel.run.sources import read_sources
from satchel.run.trainer import train
from tests.run.toys import CharTokenizer, toy_decoder, toy_pretraining, toy_text

SIZES = {"context": 64, "batch": 2, "steps": 3, "eval_rows": 2, "dtype": "fp32", "device": "cpu"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model's shape but no weights, two texts, and a run from scratch on one of them."""
    folder = tmp_path_factory.mktemp("pretrain")
    (folder / "shape").mkdir()
    (toy(folder / "toy", width=192, layers=1) / "config.json").rename(folder / "shape" / "config.json")
    old, _ = toy_text(folder / "old.jsonl"), toy_text(folder / "new.jsonl", word="xyz")
    job = PretrainJob(model=str(folder / "shape"), data=(old,), out=str(folder / "a"), scratch=True, tokenizer="demo")
    return folder, satchel.pretrain(job.replace(**SIZES))


def test_from_a_shape_and_a_tokenizer_comes_a_model_that_knows_the_text_better(home):
    folder, receipt = home
    assert receipt.losses["held_out_after/old"] < receipt.losses["held_out_before/old"]
    assert receipt.job["lr"] == 0 and receipt.line("weights").error == pytest.approx(0, abs=1e-3)
    decoder, tokenizer = satchel.load(receipt.outputs["model"]), satchel.load_tokenizer(receipt.outputs["model"])
    shape = find_source(str(folder / "shape"), weights=False).config
    assert dataclasses.replace(decoder.config, source="") == dataclasses.replace(shape, source="")
    assert tokenizer.key() == satchel.load_tokenizer("demo").key()


def test_it_goes_on_from_that_model_on_a_mixture_and_watches_each_source(home):
    folder, before = home
    data = (f"{folder}/new.jsonl:0.5", f"{folder}/old.jsonl:0.5")
    job = PretrainJob(model=before.outputs["model"], data=data, out=str(folder / "b"), **SIZES)
    receipt = satchel.pretrain(job)
    assert receipt.losses["held_out_before/old"] == pytest.approx(before.losses["held_out_after/old"], rel=1e-4)
    first = next(line for line in read_metrics(folder / "b" / "metrics.jsonl") if "held_out_loss" in line)
    each = [first["held_out_loss/new"], first["held_out_loss/old"]]
    assert min(each) <= first["held_out_loss"] <= max(each)


def test_a_folder_without_weights_names_the_way_to_begin_with_random_ones(home):
    folder, _ = home
    with pytest.raises(ModelError, match="--scratch"):
        satchel.pretrain(
            PretrainJob(model=str(folder / "shape"), data=("demo",), out=str(folder / "c"), tokenizer="demo")
        )


def test_a_tokenizer_of_more_tokens_than_the_model_has_rows_is_refused(home, tmp_path):
    config = json.loads((home[0] / "shape" / "config.json").read_text()) | {"vocab_size": 1000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    job = PretrainJob(model=str(tmp_path), data=("demo",), out=str(tmp_path / "c"), scratch=True, tokenizer="demo")
    with pytest.raises(ModelError, match="does not match the model"):
        satchel.pretrain(job)


def test_the_same_seed_draws_the_same_weights():
    config = toy_decoder().config
    models = [draw(config, torch.float32, "cpu", seed).state_dict() for seed in (0, 0, 1)]
    same = [torch.equal(models[0][name], models[1][name]) for name in models[0]]
    assert all(same) and not torch.equal(models[0]["lm_head.weight"], models[2]["lm_head.weight"])


def ended(job):
    """Train a toy; its weights and the steps of its metrics."""
    assembly = assemble(job, toy_decoder())
    train(job, assembly, read_sources(job, CharTokenizer()))
    lines = [line for line in read_metrics(Path(job.out) / "metrics.jsonl") if "loss" in line]
    return torch.cat([p.detach().flatten() for _, p in assembly.parameters]), [line["step"] for line in lines]


def test_a_branch_is_the_run_that_would_have_had_its_mixture_from_the_start(tmp_path):
    """Upsampling changes nothing before its stretch: only that stretch is paid for, for every source left out."""
    job = toy_pretraining(tmp_path, steps=10, save_every=8, schedule="cosine:warmup=0.2")
    base, _ = ended(job)
    point = str(tmp_path / "out" / "checkpoints" / "step-000008")
    for without in (0, 2):
        mixture = f"upsample:last=0.2,to=1+3,cap=99,without={without}"
        whole, steps = ended(job.replace(out=str(tmp_path / f"whole{without}"), mixture=mixture))
        branch, after = ended(job.replace(out=str(tmp_path / f"branch{without}"), mixture=mixture, branch=point))
        assert torch.equal(branch, whole) and not torch.equal(branch, base)
        assert steps == list(range(1, 11)) and after == [9, 10]
    first = next(line for line in read_metrics(tmp_path / "branch0" / "metrics.jsonl"))
    assert first["step"] == 8 and "held_out_loss/small" in first


@pytest.mark.parametrize(
    ("changes", "complaint"), [({"steps": 4}, "at step 4 and the job has 4"), ({"branch": "no"}, "no: no checkpoint")]
)
def test_a_branch_that_leads_nowhere_is_refused(tmp_path, changes, complaint):
    job = toy_pretraining(tmp_path, steps=4)
    ended(job)
    there = {"branch": str(tmp_path / "out" / "checkpoints" / "step-000004"), "out": str(tmp_path / "b"), "steps": 9}
    with pytest.raises(UserError, match=complaint):
        ended(job.replace(**(there | changes)))


def test_another_mixture_is_another_job_and_does_not_resume(tmp_path):
    job = toy_pretraining(tmp_path, steps=1)
    train(job, assemble(job, toy_decoder()), read_sources(job, CharTokenizer()))
    other = job.replace(resume=True, data=(job.data[0], job.data[1].replace(":1", ":9")))
    with pytest.raises(UserError, match="resume: data was"):
        train(other, assemble(other, toy_decoder()), read_sources(other, CharTokenizer()))
