"""What this machine is, and how fast it is at what models do: measured once, kept in the user's cache.

A rate is not one number: a product of small matrices runs at a tenth of the speed of a large one, and an addition in
the cache at ten times that of one in memory. So each kind of work has a curve, seconds a call over the size of the
call, and the time of a rehearsed run is the sum over its calls. Between two measured sizes the curve is a power law.
What the sum leaves out (shapes that are no squares, the interpreter, caches that a whole step spills) is one factor a
dtype: the time of a real step of a reference model over the sum for it.
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
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

from satchel.core.errors import UserError
from satchel.core.job import TuneJob
from satchel.model.config import ModelConfig
from satchel.run.assemble import DTYPES
from satchel.run.memory import available_bytes
from satchel.run.rehearse import rehearse
from satchel.run.step import train_step
from satchel.run.tracker import Work
from satchel.run.warm import real

FORMAT = 2  # of what is measured; another number measures anew
CACHE = Path.home() / ".cache" / "satchel" / "devices"
REFERENCE = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "num_hidden_layers": 6}
REFERENCE |= {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 1408, "rms_norm_eps": 1e-5}
REFERENCE |= {"max_position_embeddings": 2048, "tie_word_embeddings": True, "hidden_act": "silu"}
Curve = list[tuple[float, float]]  # (size of a call, seconds), sizes rising


@dataclass(frozen=True)
class Device:
    """One processor: the CPU of this machine or one GPU."""

    kind: str  # 'cpu' or 'cuda'
    name: str
    cores: int  # CPU threads that torch uses, or multiprocessors
    memory_bytes: int
    torch: str
    curves: dict[str, Curve]  # by kind of work: over operations, for 'move' over bytes
    slowdown: dict[str, float] = field(default_factory=dict)  # by dtype: a real step over the sum of its calls

    def free_bytes(self) -> int:
        """Bytes that a job could take now."""
        return torch.cuda.mem_get_info()[0] if self.kind == "cuda" else available_bytes()

    def seconds(self, work: Counter[Work]) -> float:
        """The time that a step of these calls takes."""
        total, flops = 0.0, Counter()
        for item, count in work.items():
            total += count * self._call_seconds(item)
            flops[item.kind.rpartition("/")[2]] += count * item.flops
        return total * self.slowdown.get(max(flops, key=flops.__getitem__, default=""), 1.0)

    def rate(self, kind: str) -> float:
        """The best measured rate: operations per second, for 'move' bytes per second."""
        return max(size / seconds for size, seconds in self.curves[kind])

    def _call_seconds(self, item: Work) -> float:
        moving = interpolate(self.curves["move"], item.moved_bytes)
        if not item.flops:
            return moving
        return max(moving, interpolate(self.curves.get(item.kind, self.curves["float32"]), item.flops))


def device(kind: str = "auto", cache: Path = CACHE) -> Device:
    """This machine's device, measured on first use (about 20 s). Raises UserError for a device that is not there."""
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
    """Measure the curves of a device, now."""
    cuda = kind == "cuda"
    curves: dict[str, Curve] = {"move": _moves(kind)}
    for dtype in DTYPES.values():
        name = str(dtype).removeprefix("torch.")
        curves[name] = [_product(kind, dtype, side) for side in (16, 64, 256, 512, 1024, 2048)]
        curves[f"attention/{name}"] = [_attention(kind, dtype, tokens) for tokens in (16, 128, 512, 1024)]
    bare = Device(
        kind=kind,
        name=_name(kind),
        cores=torch.cuda.get_device_properties(0).multi_processor_count if cuda else torch.get_num_threads(),
        memory_bytes=torch.cuda.mem_get_info()[1] if cuda else psutil.virtual_memory().total,
        torch=torch.__version__,
        curves={kind: _rising(curve) for kind, curve in curves.items()},
    )
    return replace(bare, slowdown={str(DTYPES[name]).removeprefix("torch."): _slowdown(bare, name) for name in DTYPES})


def _slowdown(bare: Device, dtype: str) -> float:
    """A real step of the reference job over the sum of its calls; the quickest of five, since others only ever add."""
    job = TuneJob(model="reference", data="demo", context=256, batch=4, dtype=dtype)
    config = ModelConfig.from_hf(REFERENCE)
    predicted = bare.seconds(rehearse(job, config, device=bare.kind).work)
    assembly, batch = real(job, config, bare.kind, (job.context,) * job.batch)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        float(train_step(assembly, [batch], 0.0)["loss"])
        times.append(time.perf_counter() - start)
    return min(times[1:]) / predicted


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


def _moves(kind: str) -> Curve:
    points = []
    for elements in (256, 16_384, 131_072, 1_048_576, 8_388_608):
        a, b = (torch.ones(elements, dtype=torch.bfloat16, device=kind) for _ in range(2))
        points.append((3 * 2 * elements, _seconds(kind, lambda a=a, b=b: a * b)))
    return points


def _product(kind: str, dtype: torch.dtype, side: int) -> tuple[float, float]:
    x, w = (torch.randn(side, side, device=kind).to(dtype) for _ in range(2))
    return 2 * side**3, _seconds(kind, lambda: F.linear(x, w))


def _attention(kind: str, dtype: torch.dtype, tokens: int) -> tuple[float, float]:
    q, k, v = (torch.randn(1, 8, tokens, 64, device=kind).to(dtype) for _ in range(3))
    flops = 2 * 2 * 8 * tokens**2 * 64
    return flops, _seconds(kind, lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))


def _seconds(kind: str, call: Callable[[], object], patience_s: float = 0.15) -> float:
    """Seconds of a call: the least of as many as fit in `patience_s`, since other programs only ever add."""
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 4 or (time.perf_counter() - begin < patience_s and len(times) < 200):
        start = time.perf_counter()
        call()
        if kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


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
