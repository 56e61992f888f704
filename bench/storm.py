"""Random requests against a real server in a tight budget: `satchel bench storm`, or `python -m bench.storm --help`.

Completions, chats, schemas and embeddings of all lengths, priorities and deadlines, through many adapters; clients
that go away, read slowly, send garbage or megabytes, half a request, or take an adapter from under the others. The
memory is little more than the server needs at least, so that answers push each other out of the pool, adapters too. It
ends at the first wrong answer: one that is lost, cut, stuck, told twice, or a 5xx. From time to time all clients pause,
and the idle server must hold nothing and find its books in order. What is written: the peak of its resident bytes
against the budget, and what the storm consisted of.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench._adapter_files import RANKS, adapters
from bench._harness import write
from bench._server import Served, least_bytes, leave, satchel, served
from bench._storm_client import Storm, Wrong, one
from bench._storm_model import tiny
from satchel.core.units import format_bytes
from satchel.model.paged import PAGE, block_bytes
from satchel.model.source import find_source
from satchel.run.assemble import DTYPES

MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """One storm."""

    model: str
    requests: int = 10_000
    clients: int = 40
    adapters: int = 24
    context: int = 512
    batch: int = 16
    step_tokens: int = 64
    spare_blocks: int = 48  # of the pool, beyond the least that a server takes
    pauses: int = 10  # times that all clients wait until the server is idle
    queue: int = 32  # fewer than clients: some are told to come again
    admission: str = "priority"
    preemption: str = "fastswitch:size=64MiB"
    decoding: str = "lookup"
    seed: int = 0

    def options(self, home: Path) -> dict[str, object]:
        """Of the server, but for its memory."""
        names = ("context", "batch", "step_tokens", "queue", "admission", "preemption", "decoding")
        return {name: getattr(self, name) for name in names} | {"adapters": home}


def storm(case: Case) -> dict[str, Any]:
    """The figures of one storm. Raises Wrong at the first thing that may not be."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "adapters"
        names = [path.name for path in adapters(home, case.model, (RANKS * case.adapters)[: case.adapters])]
        memory = least_bytes(case.model, **case.options(home)) + case.spare_blocks * _block_bytes(case.model)
        command = satchel(case.model, memory=f"{memory}B", **case.options(home))
        with served(command) as server:
            clients = Storm(server.port, names, case.context)
            begun = time.monotonic()
            checks = asyncio.run(_weather(server, clients, case))
            seconds = time.monotonic() - begun
            found = _stats(server.port)
            peak = server.peak_bytes
            _require_good_end(server)
    _require(peak <= memory, f"the server held {format_bytes(peak)} of {format_bytes(memory)}")
    figures = {
        name: found[name] for name in ("preemptions", "moved_in", "adapter_loads", "blocks", "answered", "steps")
    }
    sums = {"peak_bytes": peak, "budget_bytes": memory, "seconds": round(seconds), "checks": checks}
    return asdict(case) | figures | sums | {"outcomes": dict(sorted(clients.outcomes.items()))}


async def _weather(server: Served, clients: Storm, case: Case) -> int:
    """Sends everything; how often the idle server looked through its books."""
    left = list(range(case.requests))
    checks = 0
    for pause in range(case.pauses):
        stop = case.requests * (case.pauses - 1 - pause) // case.pauses

        async def client(stop: int = stop) -> None:
            while len(left) > stop:
                await one(clients, random.Random(case.seed * 10**9 + left.pop()))

        async with asyncio.TaskGroup() as group:
            for _ in range(case.clients):
                group.create_task(client())
        checks = await _calm(server, checks)
        print(f"{case.requests - stop} requests, {format_bytes(server.peak_bytes)}", flush=True)
    return checks


async def _calm(server: Served, checks: int) -> int:
    """Waits until nothing is open and the books were checked. Raises Wrong if that does not come."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = await asyncio.to_thread(_stats, server.port)
        if found["open"] == found["running"] == found["waiting"] == 0 and found["checks"] > checks:
            return found["checks"]
        await asyncio.sleep(0.2)
    raise Wrong(f"no client is there, and the server is not idle: {found}\n{server.log.read_text()[-3000:]}")


def _stats(port: int) -> dict[str, Any]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/stats", timeout=30) as answer:
        return json.loads(answer.read())


def _require_good_end(server: Served) -> None:
    _require(leave(server.process) == 0, f"the server left with {server.process.returncode}")
    log = server.log.read_text()
    at = log.find("Traceback")
    _require(at < 0, f"the server's log has a traceback: {log[max(at - 500, 0) : at + 3000]}")


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise Wrong(why)


def _block_bytes(model: str) -> int:
    return block_bytes(find_source(model).config, DTYPES["bf16"])


def row(found: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    refused = sum(count for kind, count in found["outcomes"].items() if kind.startswith(("spoilt", "too much")))
    gone = sum(count for kind, count in found["outcomes"].items() if kind.endswith("went away"))
    return {
        "model": Path(found["model"]).name,
        "requests": found["requests"],
        "went away": gone,
        "no requests at all": refused,
        "told to come again": found["outcomes"].get("told to come again", 0),
        "pool, tokens": found["blocks"] * PAGE,
        "preempted": found["preemptions"],
        "blocks fetched": found["moved_in"],
        "adapters loaded": found["adapter_loads"],
        "peak of budget": f"{found['peak_bytes'] / found['budget_bytes']:.1%}",
        "budget, MiB": round(found["budget_bytes"] / MIB),
        "wrong, stuck, lost, told twice, 5xx": 0,
    }


def main(given: list[str] | None = None) -> None:
    """Run the storms, and write bench/results/storm.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000, help="to the tiny model")
    parser.add_argument("--real", type=int, default=1_000, help="to SmolLM2; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        cases = [Case(str(tiny(Path(folder) / "tiny")), asked.requests, seed=asked.seed)]
        if asked.real:
            cases.append(Case("demo", asked.real, clients=24, queue=20, adapters=16, seed=asked.seed))
        found: list[dict[str, Any]] = []
        for case in cases:
            found.append(storm(case))
            table = [row(one) for one in found]
            print(table[-1], flush=True)
            write("storm", "Random requests in a tight budget, over HTTP", table, runs=found)


if __name__ == "__main__":
    main()
