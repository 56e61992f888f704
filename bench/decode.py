"""Decoding and prefill on this CPU against llama.cpp, OpenVINO GenAI and transformers: `satchel bench decode`.

SmolLM2-135M's own GGUF (Q4_1, its embeddings in Q8_0), and files of random Q4_0 weights at the shapes of larger Llamas.
Every engine gets the same file, the same random prompts and as many threads, a process of its own for each
measurement, and is measured in rounds of changing order:

    load            seconds until the first token of the first answer was said; the tokenizer included, but for
                    transformers
    first token     milliseconds for a prompt of 128 tokens
    prefill N       prompt tokens a second, the first token of the answer included
    decode N        tokens a second of one answer after a prompt of N tokens
    together N      tokens a second of N answers in all, after prompts of 32 tokens
    resident        the most that the process held until then, with interpreter and libraries

Behind each rate stands its share of what the machine could do: the weights as that engine holds them and the keys and
values read once a step, at the rate at which memory is read, or the operations at the rate of matrix products, if that
takes longer. Both rates are measured in the same rounds (bench/_decode_limits.cpp). Rows in bf16, int8 and int4 are of
the same model in Hugging Face's layout and bf16, in our formats of those names; their embeddings and head stay in bf16.

llama.cpp comes from `bash bench/peers/llama_cpp.sh DIR`, which mends its fault on CPUs with AMX; each figure is the
better one of with and without flash attention. `--llama-python DIR/bin/python` names where it is; OpenVINO is any
Python with `pip install openvino-genai`. A peer that is missing is left out with a word.

satchel and llama.cpp are measured in every round, all else in the first one only; the levels of instructions that are
many times slower get fewer and shorter prompts. All of it is meant to take less than 25 minutes on two cores. There are
results for each level of instructions that a machine has at best: decode-amx.json, decode-avx512.json.

`--work DIR` keeps models and every finished measurement there, and goes on from what it finds. `--only 'TEXT|TEXT'`
measures the cases whose `model, engine, options` holds one of these texts: `--only 'SmolLM2-135M, llama|format=auto'`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import satchel
from bench._decode_limits import Limits, Shape
from bench._decode_play import BRIEF, QUICK, SHARED_PROMPT, SHORT, USUAL
from bench._decode_shapes import Llama
from bench._harness import add_work, interleave, median, once, told, workplace, write
from satchel.model.source import demo_path, find_source
from satchel.native import draw, layout, paged, pointwise, stack
from satchel.native.build import build
from satchel.native.levels import supported

PATIENCE_S = 900
DEMO, TOY, LIMITS = "SmolLM2-135M", "toy", "limits"
VOCABULARY = 40_000  # tokens that prompts are made of, at most
SHAPES = {
    "1B shapes, 8 layers": Llama(width=2048, hidden=8192, heads=32, kv_heads=8, layers=8),
    "7B shapes, 4 layers": Llama(width=4096, hidden=11008, heads=32, kv_heads=32, layers=4),
    TOY: Llama(width=192, hidden=512, heads=3, kv_heads=1, layers=2, vocabulary=512),
}
MIB = 1 << 20


@dataclass(frozen=True)
class Side:
    """One engine in one setting."""

    engine: str  # how it is called in the table; the best of those with one name is taken
    module: str
    options: tuple[tuple[str, Any], ...] = ()  # what the measuring process is told
    home: str = "ours"  # whose Python runs it

    @property
    def settings(self) -> dict[str, Any]:
        """The options by name."""
        return dict(self.options)

    @property
    def bits(self) -> float:
        """Of a weight in the layers, where it is the model in bf16 in its own folder that is packed; 0: the file's."""
        return self.settings.get("bits", 0.0)

    @property
    def ours(self) -> bool:
        """Whether it runs as our command line runs, which has threads sleep while they wait."""
        return self.engine.startswith("satchel")


def ours(name: str, format: str, **more: float) -> Side:
    """Our engine on weights in a format."""
    return Side(name, "_decode_run", (("engine", "ours"), ("format", format), *more.items()))


OURS = ours("satchel", "auto")
LLAMA = [Side("llama.cpp", "_decode_llama", (("flash", flash),), "llama") for flash in (True, False)]
TRANSFORMERS = Side("transformers, bf16", "_decode_run", (("engine", "transformers"), ("bits", 16)))
OTHERS = [Side("OpenVINO GenAI", "_decode_openvino", (), "openvino"), TRANSFORMERS]
OTHERS += [ours("satchel, bf16", "auto", bits=16), ours("satchel, bf16 in torch", "none", bits=16)]
OTHERS += [ours("satchel, int8", "int8", bits=8), ours("satchel, int4", "int4", bits=4.5)]
FORCED = {level: ours(f"satchel, {level}", f"stored:level={level}") for level in supported()}
SLOW = [FORCED[level] for level in ("avx2", "portable") if level in FORCED]
PEERS = {"llama": "llama_cpp", "openvino": "openvino_genai"}  # what each home has to hold


@dataclass(frozen=True)
class Case:
    """An engine on a model."""

    model: str
    side: Side

    @property
    def name(self) -> str:
        """What stands in the record of runs, and what --only looks into."""
        return ", ".join([self.model, self.side.engine, *(f"{name}={value}" for name, value in self.side.options)])

    @property
    def plan(self) -> dict[str, Any]:
        """Lengths and counts."""
        if self.model == DEMO:
            return BRIEF if self.side in SLOW else USUAL
        return QUICK if self.model == TOY else SHORT

    def rounds(self, repetitions: int) -> int:
        """In how many rounds it is measured."""
        return repetitions if self.model == LIMITS or self.side in (OURS, *LLAMA) else 1


@dataclass(frozen=True)
class Bench:
    """What was measured, and where more is measured."""

    work: Path
    asked: argparse.Namespace
    found: dict[Case, list[dict[str, Any]]] = field(default_factory=dict)

    def file(self, model: str) -> Path:
        """The model's GGUF, written if it is one of ours."""
        if model == DEMO:
            return demo_path()
        path = self.work / f"{model.replace(' ', '_')}.gguf"
        return path if path.exists() else SHAPES[model].write(path)

    def folder(self, model: str) -> Path:
        """The model in Hugging Face's layout and bfloat16."""
        folder = self.work / f"{model.replace(' ', '_')}.hf"
        if not folder.exists():
            satchel.save(satchel.load(str(self.file(model)), torch.bfloat16), folder)
        return folder

    def measure(self, case: Case, number: int) -> dict[str, Any]:
        """One measurement, or what an earlier call has kept of it."""
        argument, places = {"threads": self.asked.threads, "quick": self.asked.quick} | case.side.settings, {}
        if case.model != LIMITS:
            places["file"] = str(self.file(case.model))
            vocabulary = min(find_source(places["file"]).config.vocab, VOCABULARY)
            argument |= {"model": case.model, "plan": case.plan, "vocabulary": vocabulary}
        if case.side.bits:
            places["folder"] = str(self.folder(case.model))
        how = {"python": self.python(case.side.home), "environment": None if case.side.ours else as_it_is()}
        return once(self.work, f"bench.{case.side.module}", argument, PATIENCE_S, number, how, **places)

    def python(self, home: str) -> str:
        """The interpreter that runs an engine."""
        peers = {"llama": self.asked.llama_python, "openvino": self.asked.openvino_python}
        return str(peers.get(home, sys.executable))

    def result(self, case: Case) -> dict[str, float]:
        """The medians of a case; nothing where it failed or was not measured."""
        whole = [result for result in self.found.get(case, []) if "error" not in result]
        names = [name for name, value in whole[0].items() if not isinstance(value, str)] if whole else []
        return {name: median(result[name] for result in whole) for name in names}


def cases(asked: argparse.Namespace) -> list[Case]:
    """What is measured; peers that are not there are left out."""
    missing, smollm = set(absent(asked)), [OURS, *LLAMA, *OTHERS, *FORCED.values()]
    large = {name: [OURS, *LLAMA] for name in SHAPES if name != TOY}
    sides_of = {TOY: smollm} if asked.quick else {DEMO: smollm} | large
    every = [Case(model, side) for model, sides in sides_of.items() for side in sides if side.home not in missing]
    chosen = [case for case in every if any(text in case.name for text in asked.only.split("|"))]
    return [Case(LIMITS, Side("the machine", "_decode_limits")), *chosen]


def absent(asked: argparse.Namespace) -> Iterator[str]:
    """The peers that are not there; says so."""
    for home, module in PEERS.items():
        python = getattr(asked, f"{home}_python")
        try:
            found = subprocess.run([python, "-c", f"import {module}"], capture_output=True).returncode == 0
        except OSError:
            found = False
        if not found:
            cure = {"llama": "bash bench/peers/llama_cpp.sh DIR builds it", "openvino": "pip install openvino-genai"}[
                home
            ]
            print(f"{module} is left out: '{python}' has none; {cure}, and --{home}-python names it")
            yield home


def compiled() -> None:
    """Our kernels are in the cache before anything is measured: they are compiled once a machine, in a minute."""
    for level in supported():
        stack.kernel(level)
    for library in (layout.library, paged.library, pointwise.library, draw.library):
        library()
    build("page_pool")


def as_it_is() -> dict[str, str]:
    """The environment of a user who has set nothing: threads of OpenMP spin while they wait, which is quicker alone."""
    return {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}


def table(bench: Bench, wanted: list[Case]) -> list[dict[str, Any]]:
    """One line an engine and model, and under each model how ours compares with llama.cpp."""
    limits, lines = limits_of(bench, wanted), []
    for model in dict.fromkeys(case.model for case in wanted if case.model != LIMITS):
        best: dict[str, dict[str, float]] = {}
        cases: dict[str, Case] = {}
        for case in wanted:
            if case.model == model and (found := bench.result(case)):
                best[case.side.engine] = better(best.get(case.side.engine, {}), found)
                cases[case.side.engine] = case
        lines += [line(cases[name], found, shape_of(bench, cases[name]), limits) for name, found in best.items()]
        if "satchel" in best and "llama.cpp" in best:
            lines.append(ratios(model, best["satchel"], best["llama.cpp"]))
    return lines


def shape_of(bench: Bench, case: Case) -> Shape:
    """What the engine reads and computes: the file's weights, or its own form of those of the folder."""
    file = bench.file(case.model)
    found = Shape.of(find_source(str(file)).config, file.stat().st_size)
    own = int(found.products * case.side.bits / 8) + 2 * found.head
    return replace(found, weight_bytes=own) if case.side.bits else found


def limits_of(bench: Bench, wanted: list[Case]) -> Limits | None:
    """The best that was seen in any round."""
    seen = [found for found in bench.found.get(wanted[0], []) if "error" not in found]
    return Limits(*(max(found[name] for found in seen) for name in ("bytes_s", "operations_s"))) if seen else None


def better(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    """Figure by figure the better of two settings: rates are the higher the better, all else the lower."""
    pick = {name: max if rates(name) else min for name in other}
    return {name: pick[name](one.get(name, value), value) for name, value in other.items()}


def rates(name: str) -> bool:
    """Whether the figure is tokens a second."""
    return name.startswith(("prefill", "decode", "together"))


def line(case: Case, found: dict[str, float], shape: Shape, limits: Limits | None) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"model": case.model, "engine": case.side.engine}
    row |= {"load, s": f"{found['load_s']:.2f}", "first token, ms": f"{1e3 * found['first_s']:.0f}"}
    for name, (tokens, least) in steps(shape, case.plan).items():
        share = f" ({found[name] * limits.seconds(*least) / tokens:.0%})" if limits else ""
        row[f"{name}, tokens/s"] = f"{found[name]:.0f}{share}"
    return row | {"resident, MiB": f"{found['resident_bytes'] / MIB:.0f}"}


def steps(shape: Shape, asked: dict[str, Any]) -> dict[str, tuple[int, tuple[float, float]]]:
    """For each rate the tokens of a step, and the bytes and operations that it takes at least."""
    half, out = asked["count"] // 2, {}
    out |= {f"prefill {n}": (n, shape.prefill(n)) for n in asked["prefill"]}
    out |= {f"decode {n}": (1, shape.decode(n + half)) for n in asked["after"]}
    return out | {f"together {n}": (n, shape.decode(SHARED_PROMPT + half, n)) for n in asked["together"]}


def ratios(model: str, ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    """Ours over llama.cpp's, figure by figure."""
    names = {"load_s": "load, s", "first_s": "first token, ms", "resident_bytes": "resident, MiB"}
    row = {names.get(name, f"{name}, tokens/s"): f"x {ours[name] / theirs[name]:.2f}" for name in ours}
    return {"model": model, "engine": "satchel over llama.cpp"} | row


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-python", type=Path, default=sys.executable, help="a Python with llama-cpp-python")
    parser.add_argument("--openvino-python", type=Path, default=sys.executable, help="a Python with openvino-genai")
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument("--repetitions", type=int, default=3, help="rounds of satchel and llama.cpp; all else has one")
    parser.add_argument("--only", default="", help="'TEXT|TEXT': only cases whose name holds one of them")
    parser.add_argument("--quick", action="store_true", help="a toy, one round of few tokens, written nowhere")
    add_work(parser)
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure, and write bench/results/decode-LEVEL.json after every measurement."""
    asked = arguments(given)
    wanted, seen = cases(asked), Counter[Case]()
    compiled()
    with workplace(asked.work) as work:
        bench = Bench(work, asked)
        repetitions = 1 if asked.quick else asked.repetitions
        for case in interleave(wanted, repetitions):
            if seen[case] == case.rounds(repetitions):
                continue
            seen[case] += 1
            result = bench.measure(case, seen[case])
            bench.found.setdefault(case, []).append(result)
            print(f"{case.name}: {result}", flush=True)
            if not asked.quick:
                report(bench, wanted)
        lines = table(bench, wanted)
    for each in lines:
        print(each)
    return lines


def report(bench: Bench, wanted: list[Case]) -> Path:
    """Write what was found so far."""
    limits = limits_of(bench, wanted)
    rates = (
        f": reads {limits.bytes_s / 1e9:.1f} GB/s, multiplies {limits.operations_s / 1e9:.0f} GFLOP/s" if limits else ""
    )
    title = f"Decoding on {bench.asked.threads} threads, in brackets the share of what the machine could do{rates}"
    runs = {case.name: found for case, found in bench.found.items()}
    name = f"decode-{supported()[0]}"  # what is fast with one level's instructions need not be with another's
    return write(name, title, table(bench, wanted), quiet=True, arguments=told(bench.asked), runs=runs)


if __name__ == "__main__":
    main()
