"""The bench of decoding counts what it says it counts, leaves out peers that are missing, and its files are models."""

import itertools
import sys

import pytest
import torch

from bench import _harness, decode
from bench._decode_limits import Limits, Shape
from bench._decode_play import QUICK, context, play, rate
from bench.decode import TOY, Bench, Case, Side, better
from satchel.model.load import load
from satchel.model.source import find_source
from satchel.native.build import compiler


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return decode.SHAPES[TOY].write(tmp_path_factory.mktemp("decode") / "toy.gguf")


def test_figures_are_tokens_over_the_time_that_they_took():
    """An engine that reads a prompt token in a millisecond and says a token every 10 ms."""

    def answer(prompts, count):
        return [[1e-3 * len(prompt) + 1e-2 * step for step in range(count)] for prompt in prompts]

    found = play(lambda case: answer, {"plan": QUICK, "vocabulary": 512})
    assert found["prefill 24"] == pytest.approx(1000) and found["first_s"] == pytest.approx(8e-3)
    assert found["decode 8"] == pytest.approx(100) and found["together 3"] == pytest.approx(300)
    assert found["resident_bytes"] > 1 << 20


def test_tokens_that_came_before_all_answers_had_begun_do_not_count():
    assert rate([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]) == pytest.approx(3 / 2)


def test_the_context_holds_the_longest_answer_and_all_that_grow_together():
    plan = {"prefill": [100], "after": [98], "together": [1, 2], "count": 4}
    assert context(plan) == 2 * (32 + 4 + 16)
    assert context(plan | {"together": [1]}) == 103


def test_a_step_takes_at_least_its_bytes_or_its_operations():
    config = find_source("demo").config
    shape = Shape.of(config, 96_400_000)
    assert shape.products + shape.head == 134_515_008 - (2 * 30 + 1) * 576  # all parameters but those of norms
    assert shape.token_bytes == 30 * 2 * 3 * 64 * 2
    nbytes, operations = shape.decode(1024)
    assert nbytes == 96_400_000 + 1024 * shape.token_bytes
    assert operations == 2 * 134_479_872 + 30 * 4 * 9 * 64 * 1024
    assert shape.decode(1024, 8) == (96_400_000 + 8 * 1024 * shape.token_bytes, 8 * operations)
    limits = Limits(bytes_s=1e9, operations_s=1e12)
    assert limits.seconds(2e9, 1e12) == 2 and limits.seconds(1e9, 3e12) == 3


def test_the_better_of_two_settings_is_taken_figure_by_figure():
    one, other = {"prefill 512": 9.0, "load_s": 2.0}, {"prefill 512": 5.0, "load_s": 1.0}
    assert better(better({}, one), other) == {"prefill 512": 9.0, "load_s": 1.0}


def test_a_peer_that_is_missing_is_left_out_with_a_word(capsys):
    asked = decode.arguments(["--llama-python", "/no/such/python", "--openvino-python", sys.executable])
    engines = {case.side.engine for case in decode.cases(asked)}
    assert {"satchel", "transformers, bf16"} <= engines and not engines & {"llama.cpp", "OpenVINO GenAI"}
    said = capsys.readouterr().out
    assert "'/no/such/python' has none; bash bench/peers/llama_cpp.sh" in said and "pip install openvino-genai" in said


def test_the_random_files_are_models_whose_numbers_keep_their_size(toy):
    model, shape = load(str(toy), torch.float32), decode.SHAPES[TOY]
    assert len(model.layers) == shape.layers and model.config.vocab == shape.vocabulary
    with torch.inference_mode():
        logits = model(torch.arange(10)[None])
    assert logits.isfinite().all() and 0.1 < float(logits.std()) < 10


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_ours_and_the_machine_are_measured(toy, tmp_path):
    bench = Bench(toy.parent, decode.arguments(["--quick", "--threads", "1"]))
    wanted = [Case(decode.LIMITS, Side("the machine", "_decode_limits")), Case(TOY, decode.ours("satchel", "none"))]
    for case in wanted:
        bench.found[case] = [bench.measure(case, 1)]
    limits = decode.limits_of(bench, wanted)
    assert 1e8 < limits.bytes_s < 1e12 and 1e9 < limits.operations_s < 1e14
    (row,) = decode.table(bench, wanted)
    assert row["engine"] == "satchel" and "%" in row["decode 8, tokens/s"] and 50 < float(row["resident, MiB"]) < 2000


def test_what_was_measured_is_not_measured_again_and_ours_stands_over_llama(toy, monkeypatch):
    numbers = itertools.count(1)
    figures = ("load_s", "first_s", "prefill 24", "decode 8", "together 3", "resident_bytes")

    def measured(module, argument, timeout_s, python, environment):
        n = next(numbers)
        return {"bytes_s": 1e9, "operations_s": 1e12} if "limits" in module else dict.fromkeys(figures, float(n))

    monkeypatch.setattr(_harness, "measure", measured)
    monkeypatch.setattr(decode, "absent", lambda asked: iter(()))
    monkeypatch.setattr(decode, "compiled", lambda: None)
    given = ["--quick", "--only", "llama", "--work", str(toy.parent / "work")]
    first = decode.main(given)
    made = next(numbers)
    assert decode.main(given) == first and next(numbers) == made + 1
    lines = decode.main(["--quick", "--work", str(toy.parent / "work")])
    assert "satchel over llama.cpp" in {line["engine"] for line in lines}
