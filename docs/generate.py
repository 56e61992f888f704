"""Write what is generated: docs/METHODS.md from the cards, docs/RESULTS.md from bench/results, README.md's tour and
summary from docs/tour.txt and these, satchel/run/measured.json, what the planner knows of the methods.

python docs/generate.py            write        python docs/generate.py --check    exit 1 if anything would change
"""

import json
import sys
from pathlib import Path

from headlines import bench_of, headline

from satchel.core import book
from satchel.core.book import Entry
from satchel.run.measured import FILE, RATIOS

ROOT = Path(__file__).parent.parent
MARKS = "<!-- {}: begin -->", "<!-- {}: end -->"
PLANNED = {"tune": ("activations", "format"), "optimizer": ("optimizer",)}  # slots that a bench measures for plans
ORIGIN = ("commit", "dirty", "date", "machine", "title")
RESULT = {"exact": "exact", "approx": "near", "study": "study"}


def methods() -> str:
    """METHODS.md: one table a slot, one section a method."""
    lines = [
        "# Methods",
        "",
        "Generated from the methods' files by `make docs`. `satchel show NAME` prints the same in a terminal.",
        "",
        "An *exact* result is that of the plain job up to rounding; a *near* one differs, the bench says by how much.",
    ]
    for slot in book.slots():
        found = [entry for entry in book.entries() if entry.slot == slot]
        if found:
            lines += [
                "",
                f"## {slot}",
                "",
                "| name | what it does | result | saves | spends |",
                "| --- | --- | --- | --- | --- |",
            ]
            lines += [_row(entry) for entry in found]
            lines += [line for entry in found for line in _section(entry)]
    return "\n".join(lines) + "\n"


def _row(entry: Entry) -> str:
    card = entry.card
    cells = (f"`{entry.name}`", entry.summary, RESULT[card.fidelity], ", ".join(card.saves), ", ".join(card.spends))
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _section(entry: Entry) -> list[str]:
    lines = ["", f"### {entry.name}", "", "```text", entry.doc, "```"]
    if entry.knobs:
        lines += ["", "| knob | type | default | meaning |", "| --- | --- | --- | --- |"]
        lines += [f"| `{k.name}` | {_cell(k.kind)} | `{k.default}` | {_cell(k.comment)} |" for k in entry.knobs]
    if entry.card.claim:
        lines += ["", f"The authors' claim: {entry.card.claim}. Paper: <{entry.card.paper}>"]
    return lines


def found_results() -> dict[str, dict]:
    """What bench/results holds of benches that have a table, by name."""
    files = sorted((ROOT / "bench" / "results").glob("*.json"))
    found = {path.stem: json.loads(path.read_text()) for path in files}
    return {name: each for name, each in found.items() if each.get("table")}


def results() -> str:
    """RESULTS.md: one section a bench, with its table and its plot."""
    lines = ["# Results", "", "Generated from `bench/results` by `make docs`: every figure fell out of a bench's run."]
    for name, found in found_results().items():
        lines += ["", f"## {name}", "", _table(name, found, found["table"])]
        if (ROOT / "bench" / "results" / f"{name}.png").exists():
            lines += ["", f"![{found['title']}](../bench/results/{name}.png)"]
    return "\n".join(lines) + "\n"


def summary() -> str:
    """A line a bench, for the README."""
    lines = ["| bench | what it measures | what came out |", "| --- | --- | --- |"]
    for name, found in found_results().items():
        cells = (f"[{name}](docs/RESULTS.md#{name})", found["title"], headline(name, found["table"]))
        lines.append(f"| {' | '.join(_cell(cell) for cell in cells)} |")
    return "\n".join(lines)


def _table(name: str, found: dict, rows: list[dict]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))  # what was not measured has fewer
    machine, commit = found.get("machine", "?"), str(found.get("commit", "?"))[:10]
    dirty = ", with local changes" if found.get("dirty") else ""
    lines = [
        f"**{found.get('title', name)}** (`satchel bench {bench_of(name)}`; {_plain(machine)}; commit {commit}{dirty})",
        "",
    ]
    lines += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    lines += [f"| {' | '.join(_cell(_plain(row.get(column, ''))) for column in columns)} |" for row in rows]
    return "\n".join(lines)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(str(v) for v in value.values())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def measured() -> str:
    """The `quality` of the benches whose methods the planner may choose, and where it is from, as the installed package
    carries it."""
    benches, methods = [], []
    for name, slots in PLANNED.items():
        path = ROOT / "bench" / "results" / f"{name}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        benches.append({"bench": name} | {key: found.get(key) for key in ORIGIN})
        lines = (line for line in found.get("quality", []) if line["slot"] in slots)
        methods += [{column: line[column] for column in ("slot", "method", "steps", *RATIOS)} for line in lines]
    return json.dumps({"benches": benches, "methods": methods}, indent=1) + "\n"


def tour() -> str:
    """What `make demo` printed; `bash examples/demo.sh > docs/tour.txt` takes it anew."""
    path = ROOT / "docs" / "tour.txt"
    return f"```console\n{path.read_text().strip()}\n```" if path.exists() else "`make demo` shows it."


def readme(text: str) -> str:
    """The README with fresh tour and tables between their marks."""
    for name, fresh in (("tour", tour()), ("results", summary())):
        begin, end = (mark.format(name) for mark in MARKS)
        text = f"{text[: text.index(begin)]}{begin}\n{fresh}\n{text[text.index(end) :]}"
    return text


def main() -> int:
    """Write the files that differ; their names on stdout."""
    check = "--check" in sys.argv[1:]
    path = ROOT / "README.md"
    docs = ROOT / "docs"
    fresh = {docs / "METHODS.md": methods(), docs / "RESULTS.md": results(), FILE: measured()}
    fresh[path] = readme(path.read_text())
    stale = [path for path, text in fresh.items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)} {'is stale: run make docs' if check else 'written'}")
        if not check:
            path.write_text(fresh[path])
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
