"""What each bench came to, in a line, from its table alone: README.md shows these, docs/RESULTS.md the tables."""

from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
Rows = list[Row]


def headline(name: str, rows: Rows) -> str:
    """The line of one file of results: of a bench, or 'BENCH-KIND' of a bench on one kind of machine."""
    return HEADLINES[bench_of(name)](rows)


def bench_of(name: str) -> str:
    """Which bench wrote a file of results."""
    return name.partition("-")[0]


def _activations(rows: Rows) -> str:
    longest = [column for column in rows[0] if column.startswith("longest")]
    return "; ".join(f"{column} " + ", ".join(f"{row['policy']} {row[column]}" for row in rows) for column in longest)


def _adapters(rows: Rows) -> str:
    value = {row["what"]: row["value"] for row in rows}
    mixed, merged = value["tokens/s, all adapters in one batch"], value["tokens/s, merged one after another"]
    return (
        f"{mixed / merged:.1f} times the throughput of merging; pool held {value['pool held at its peak']} at its peak"
    )


def _budget(rows: Rows) -> str:
    value = {row["what"]: row["value"] for row in rows}
    return (
        f"{value['finished within their budget']} of {value['accepted']} accepted jobs ended within their budget, none "
        f"above {value['highest peak / budget of an accepted job']} of it; {value['shown not to fit']} of "
        f"{value['refused']} refused ones are shown not to fit"
    )


def _checkpoint(rows: Rows) -> str:
    said = []
    for job in dict.fromkeys(row["job"] for row in rows):
        known = [row for row in rows if row["job"] == job and "checkpoint, MiB" in row]
        blocking = {row["disk"]: row["of it waiting, s"] for row in known if row["way"] == "blocking"}
        lazy = [row for row in known if row["way"] == "datastates" and blocking.get(row["disk"])]
        waits = _span(round(row["of it waiting, s"] / blocking[row["disk"]], 3) for row in lazy)
        costs = _span(row["of the blocking one's"] for row in lazy)
        said.append(f"{job}: waits {waits}, costs {costs}")
    return f"a lazy checkpoint over a blocking one, {'; '.join(said)}"


def _company(rows: Rows) -> str:
    return "; ".join(f"{row['weights']}: {row['greedy tokens that change']} of greedy tokens change" for row in rows)


def _continual(rows: Rows) -> str:
    run = {row["run"]: row for row in rows}
    forgot = ", ".join(f"{name} {run[name]['forgotten']}" for name in ("neither", "re-warm", "re-warm and replay"))
    best, union = run["re-warm and replay"]["mean"], run["union from scratch"]["mean"]
    return f"nats forgotten: {forgot}; with re-warming and replay {float(best) / float(union):.3f} of the union's loss"


def _decode(rows: Rows) -> str:
    over = next(row for row in rows if row["engine"] == "satchel over llama.cpp")
    parts = [f"{column.partition(',')[0]} {over[column].lstrip('x ')}x" for column in list(over)[2:] if over[column]]
    return f"{over['model']} over llama.cpp: {', '.join(parts)}"


def _killed(rows: Rows) -> str:
    kills, whole = (sum(row[name] for row in rows) for name in ("kills", "kills that left a whole checkpoint"))
    ends, same = (
        sum(row[name] for row in rows) for name in ("runs that ended", "bit for bit as one that was not killed")
    )
    return f"{whole} of {kills} kills left a whole checkpoint; {same} of {ends} runs ended bit for bit the same"


def _optimizer(rows: Rows) -> str:
    said = []
    for job in dict.fromkeys(row["job"] for row in rows):
        known = [row for row in rows if row["job"] == job and "peak ratio" in row]
        good = [row for row in known if row["peak ratio"] <= 0.45 and float(row["loss ratio"].split()[0]) <= 1.02]
        names = "; ".join(f"{row['optimizer']} (seeds: {row['seeds']})" for row in good) or "none"
        said.append(f"{job}: {names}")
    return f"peak at most 0.45x AdamW's and loss at most 1.02x: {'. '.join(said)}"


def _plan(rows: Rows) -> str:
    of = {row["estimate"]: row for row in rows}
    parts = [f"{what} {_percent(of[f'satchel, {what}, all rows'])}" for what in ("tensors", "resident", "seconds")]
    return f"median error and worst: {', '.join(parts)}"


def _prefill(rows: Rows) -> str:
    packed = [row for row in rows if row["way"] == "packed"]
    return "; ".join(f"{row['lengths']}: {row['over padded']}x the time of padding" for row in packed)


def _serve(rows: Rows) -> str:
    speed = {(row["clients"], row["way"]): row["tokens/s"] for row in rows}
    most = max(count for count, _ in speed if isinstance(count, int))
    return f"tokens/s at {most} clients: " + ", ".join(
        f"{way} {s}" for (count, way), s in speed.items() if count == most
    )


def _speculate(rows: Rows) -> str:
    guesses = [row for row in rows if "speed, wall" in row and row["way"] != "plain"]
    best = max(guesses, key=lambda row: row["speed, wall"])
    pays = sum(row["speed, wall"] > 1 for row in guesses)
    kind = f"{best['prompts']}, {best['at once']} at once"
    return f"pays in {pays} of {len(guesses)} cases; best {best['way']}: {best['speed, wall']}x ({kind})"


def _storm(rows: Rows) -> str:
    bad = "wrong, stuck, lost, told twice, 5xx"
    return "; ".join(
        f"{row['requests']:,} requests to {row['model']}: {row[bad]} wrong, stuck, lost or told twice, "
        f"peak {row['peak of budget']} of the budget"
        for row in rows
    )


def _switch(rows: Rows) -> str:
    return "; ".join(f"{row['way']} {row['s']} s, stalls {row.get('stalls, ms in all', '-')} ms" for row in rows)


def _tune(rows: Rows) -> str:
    memory, cpu, loss = (_span(row[name] for row in rows) for name in ("memory ratio", "CPU ratio", "loss ratio"))
    return f"over peers, {len(rows)} comparisons: memory {memory}, CPU seconds {cpu}, held-out loss {loss}"


def _zeroth(rows: Rows) -> str:
    known = [row for row in rows if row["peak over inference"] != "-"]
    ours, adamw = ([row for row in known if (row["optimizer"] == "adamw") == is_it] for is_it in (False, True))
    spans = [_span(row["peak over inference"] for row in some) for some in (ours, adamw)]
    return f"peak over inference {spans[0]}; AdamW's {spans[1]}"


def _span(values: Iterable[float]) -> str:
    known = sorted(values)
    return f"{known[0]}x to {known[-1]}x" if known else "not measured"


def _percent(row: Row) -> str:
    return f"{row['median, %']}% and {row['worst, %']}%"


HEADLINES: dict[str, Callable[[Rows], str]] = {
    "activations": _activations,
    "adapters": _adapters,
    "budget": _budget,
    "checkpoint": _checkpoint,
    "company": _company,
    "continual": _continual,
    "decode": _decode,
    "killed": _killed,
    "optimizer": _optimizer,
    "plan": _plan,
    "prefill": _prefill,
    "serve": _serve,
    "speculate": _speculate,
    "storm": _storm,
    "switch": _switch,
    "tune": _tune,
    "zeroth": _zeroth,
}
