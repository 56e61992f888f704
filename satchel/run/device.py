"""What this machine is, and how fast it is at what models do: measured once, kept in the user's cache.

A rate is not one number, and an operator alone in a loop is three to ten times quicker than in a step, where its data
lie in memory and its threads asleep. So operators are timed where they occur: in real steps of small reference models,
one job for every dtype and size, one more for every method that brings operators of its own. For each operator that
gives a curve, seconds a call over the size of the call, and the time of a rehearsed run is the sum over its calls.
Between two measured sizes a curve is a power law. Between the operators lies the interpreter, some time a call; what
the sum still misses is one factor a dtype. A fixed piece of work, timed among the steps and again when a job is
planned, tells how much faster or slower the machine has become: a shared one's speed moves by half within minutes.
"""

import hashlib
import json
import math
import os
import platform
import subprocess
import sys
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from satchel.core import book
from satchel.core.errors import UserError
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.run.assemble import DTYPES
from satchel.run.memory import available_bytes, install_pool
from satchel.run.step import train_step
from satchel.run.tracker import Work, work_of
from satchel.run.warm import real

FORMAT = 6  # of what is measured; another number measures anew
CACHE = Path.home() / ".cache" / "satchel" / "devices"
ANY = "any"  # the curve, over bytes, of operators that no reference job has
REFERENCE = {"model_type": "llama", "vocab_size": 16384, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
REFERENCE |= {"max_position_embeddings": 2048, "tie_word_embeddings": True}
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"hidden_act": "gelu_pytorch_tanh"}  # the other kind of gate: four times as long as silu's
MIDDLE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 12}
LARGE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 1, "num_attention_heads": 32}
SHAPES = ((SMALL, 2, 128), (MIDDLE, 4, 256), (LARGE, 1, 1024))  # with rows, tokens a row
GPT = {"model_type": "gpt2", "vocab_size": 4096, "n_embd": 768, "n_layer": 1, "n_head": 12, "n_positions": 256}
GEMMA = {"model_type": "gemma2", "vocab_size": 4096, "hidden_size": 768, "intermediate_size": 2048, "head_dim": 128}
GEMMA |= {"num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "query_pre_attn_scalar": 128}
GEMMA |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 64}
GEMMA |= {"max_position_embeddings": 256, "rms_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
OTHERS = (GPT, GEMMA)  # families whose operators the first has not: biases, other norms and gates, soft caps
ROUNDS = 3  # over the plain jobs: a shared machine's speed changes by a tenth within seconds, and less over a minute
GAUGE = {"cpu": 1024, "cuda": 2048}  # rows and columns of the fixed piece of work
TURNS = 21  # of it: a tenth of a second
OWN_OPERATORS = ("optimizer", "format")  # slots whose methods bring operators that no other job has
PLAIN = TuneJob(model="reference", data="demo", lr=1e-6)
Curve = list[tuple[float, float]]  # (size of a call, seconds), sizes rising


@dataclass(frozen=True)
class Device:
    """One processor: the CPU of this machine or one GPU."""

    kind: str  # 'cpu' or 'cuda'
    name: str
    cores: int  # CPU threads that torch uses, or multiprocessors
    memory_bytes: int
    torch: str
    curves: dict[str, Curve]  # by kind of work, over its size
    gap_s: float = 0.0  # between two calls: the interpreter
    slowdown: dict[str, float] = field(default_factory=dict)  # by dtype: a real step over the sum of its calls
    gauge_s: float = 0.0  # of the fixed piece of work, while all this was measured
    pace: float = 1.0  # seconds now over seconds then

    def now(self) -> "Device":
        """The device at the speed that it has at this moment; a tenth of a second."""
        return replace(self, pace=gauge(self.kind) / self.gauge_s)

    def free_bytes(self) -> int:
        """Bytes that a job could take now."""
        return torch.cuda.mem_get_info()[0] if self.kind == "cuda" else available_bytes()

    def seconds(self, work: Counter[Work]) -> float:
        """The time that a step of these calls takes."""
        total, flops = 0.0, Counter()
        for item, count in work.items():
            total += count * (self._call_seconds(item) + self.gap_s)
            flops[_dtype(item)] += count * item.flops
        return total * self.pace * self.slowdown.get(max(flops, key=flops.__getitem__, default=""), 1.0)

    def rate(self, kind: str) -> float:
        """The best measured rate of a kind of work: operations per second, or bytes if it does few for each."""
        return max(size / seconds for size, seconds in self.curves[kind])

    def _call_seconds(self, item: Work) -> float:
        """A product's time grows on beyond the sizes that were measured; that of other operators as any one's does."""
        general = self.curves[ANY]
        curve = self.curves.get(item.kind, general)
        nearest = min(max(item.size, curve[0][0]), curve[-1][0])
        seconds = interpolate(curve, nearest)
        if item.flops and item.size == item.flops:
            return max(seconds * item.size / nearest, general[0][1])
        return seconds * interpolate(general, item.size) / interpolate(general, nearest)


def device(kind: str = "auto", cache: Path = CACHE) -> Device:
    """This machine's device, measured on first use (a minute). Raises UserError for one that is not there."""
    kind = resolve(kind)
    key = f"{FORMAT}-{_name(kind)}-{torch.get_num_threads()}-{torch.__version__}"
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        _measure_apart(kind, path)
    try:
        return Device(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return measure(kind)


def _measure_apart(kind: str, path: Path) -> None:
    """Measure in a process of its own: what measuring touches would count as this one's memory for ever."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    command = [sys.executable, "-m", __name__, kind, str(torch.get_num_threads()), str(draft)]
    done = subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[2])
    if done.returncode == 0:
        draft.replace(path)


def resolve(kind: str) -> str:
    """'auto' is the GPU if torch sees one. Raises UserError for a GPU that torch does not see and unknown kinds."""
    if kind == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda"):
        raise UserError(f"device '{kind}' is none of auto, cpu, cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda': torch sees no GPU here; use device 'cpu', or install a CUDA build of torch")
    return kind


def measure(kind: str) -> Device:
    """Measure a device, now; about a minute."""
    cuda = kind == "cuda"
    install_pool() if not cuda else None
    steps, gauges = [], []
    for job, config in chain.from_iterable(references() for _ in range(ROUNDS)):
        steps.append(_time_step(job, config, kind, 2))
        gauges.append(gauge(kind))
    steps = [step for step in steps if step]
    others = [_time_step(job, config, kind, 1) for job, config in methods()]
    bare = Device(
        kind=kind,
        name=_name(kind),
        cores=torch.cuda.get_device_properties(0).multi_processor_count if cuda else torch.get_num_threads(),
        memory_bytes=torch.cuda.mem_get_info()[1] if cuda else psutil.virtual_memory().total,
        torch=torch.__version__,
        curves=_curves([*steps, *filter(None, others)]),
        gap_s=max(0.0, median(step.gap_s for step in steps)),
        gauge_s=median(gauges),
    )
    ratios: dict[str, list[float]] = {}
    for step in steps:
        ratios.setdefault(step.dtype, []).append(step.seconds / bare.seconds(step.work()))
    return replace(bare, slowdown={dtype: median(found) for dtype, found in ratios.items()})


def gauge(kind: str) -> float:
    """Seconds of a fixed piece of work, a product and passes over memory, at this moment."""
    x = torch.ones(GAUGE[kind], GAUGE[kind], dtype=torch.bfloat16, device=kind)
    return median(_seconds(lambda: (x @ x).float().softmax(-1), kind) for _ in range(TURNS))


def references() -> Iterator[tuple[TuneJob, ModelConfig]]:
    """The plain jobs: an adapter, then all weights, in each size and dtype; of the largest, and of other families, only
    what is quick."""
    for shape, rows, context in SHAPES:
        config = ModelConfig.from_hf(REFERENCE | shape)
        for dtype, adapter in product(DTYPES, ("lora", "none")):
            if shape is not LARGE or (dtype, adapter) == (PLAIN.dtype, PLAIN.adapter):
                yield replace(PLAIN, batch=rows, context=context, dtype=dtype, adapter=adapter), config
    for family in OTHERS:
        yield replace(PLAIN, batch=4, context=256), ModelConfig.from_hf(family)


def methods() -> Iterator[tuple[TuneJob, ModelConfig]]:
    """A job for each method that may bring operators of its own."""
    config = ModelConfig.from_hf(REFERENCE | MIDDLE | {"num_hidden_layers": 1, "vocab_size": 4096})
    for entry in book.entries():
        if entry.slot in OWN_OPERATORS:
            adapter = "none" if entry.slot == "optimizer" else "lora"
            yield replace(PLAIN, batch=1, context=256, adapter=adapter, **{entry.slot: entry.name}), config


@dataclass(frozen=True)
class Timed:
    """A step of a reference job."""

    dtype: str
    seconds: float
    calls: dict[Work, list[float]]  # seconds of each call of an operator

    @property
    def gap_s(self) -> float:
        """Seconds between two calls; below zero where calls overlap."""
        times = list(chain.from_iterable(self.calls.values()))
        return (self.seconds - sum(times)) / len(times)

    def work(self) -> Counter[Work]:
        """The step's calls."""
        return Counter({item: len(found) for item, found in self.calls.items()})


class Stopwatch(TorchDispatchMode):
    """Times every operator while active."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.wait = torch.cuda.synchronize if kind == "cuda" else lambda: None
        self.calls: dict[Work, list[float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        self.wait()
        start = time.perf_counter()
        out = func(*args, **kwargs)
        self.wait()
        seconds = time.perf_counter() - start
        if not func.is_view and func.namespace != "prim":
            every = {id(t): t for t in tree_iter((args, kwargs, out)) if isinstance(t, Tensor)}
            self.calls.setdefault(work_of(func, args, kwargs, out, list(every.values())), []).append(seconds)
        return out


def _time_step(job: TuneJob, config: ModelConfig, kind: str, steps: int) -> Timed | None:
    """Some steps of a job as it is, one operator by operator; None if the method does not suit the model."""
    try:
        assembly, batch = real(job, config, kind, (job.context,) * job.batch)
        times = [_seconds(partial(train_step, assembly, [batch], assembly.lr), kind) for _ in range(steps)]
    except UserError:
        return None
    with Stopwatch(kind) as watch:
        train_step(assembly, [batch], assembly.lr)
    return Timed(str(DTYPES[job.dtype]).removeprefix("torch."), median(times[1:] or times), watch.calls)


def _seconds(call: Callable[[], object], kind: str) -> float:
    start = time.perf_counter()
    call()
    if kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _curves(steps: Iterable[Timed]) -> dict[str, Curve]:
    """For each kind of work the median seconds of a call, at each size that occurred."""
    samples: dict[str, dict[int, list[tuple[int, float]]]] = {ANY: {}}
    for item, found in chain.from_iterable(step.calls.items() for step in steps):
        kinds = (item.kind,) if item.flops else (item.kind, ANY)
        for kind in kinds:
            samples.setdefault(kind, {}).setdefault(_octave(item.size), []).extend(
                (max(item.size, 1), s) for s in found
            )
    return {kind: _rising([_middle(found) for found in sizes.values()]) for kind, sizes in samples.items()}


def _octave(size: int) -> int:
    return size.bit_length()


def _middle(found: list[tuple[int, float]]) -> tuple[float, float]:
    sizes, seconds = zip(*found, strict=True)
    return float(median(sizes)), median(seconds)


def _dtype(item: Work) -> str:
    return item.kind.split("/")[1]


def interpolate(curve: Curve, size: float) -> float:
    """Seconds of a call: a power law between neighbours, proportional beyond the last size, flat below the first."""
    if size <= curve[0][0]:
        return curve[0][1]
    if size >= curve[-1][0]:
        return curve[-1][1] * size / curve[-1][0]
    at = bisect_left(curve, size, key=lambda point: point[0])
    (x0, y0), (x1, y1) = curve[at - 1], curve[at]
    share = math.log(size / x0) / math.log(x1 / x0)
    return y0 * (y1 / y0) ** share


def _rising(curve: Curve) -> Curve:
    """Sizes rise, and so do seconds: noise only ever adds, so a small call takes at most what a larger one took."""
    out: Curve = []
    for size, seconds in sorted(curve, reverse=True):
        out.insert(0, (float(size), min(seconds, out[0][1] if out else seconds)))
    return out


def _name(kind: str) -> str:
    if kind == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(asdict(measure(sys.argv[1])), indent=1))
