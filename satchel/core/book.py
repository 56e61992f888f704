"""The book of methods: the folder is the registry, the file's stem is the name, the seam is the slot.

Files are read with `ast`, never imported, until a method is made. A room is any folder of the package that is not part
of the house itself; a file whose name starts with `_` is no method.
"""

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, overload

from satchel.core import seams, serve_seams
from satchel.core.card import Card
from satchel.core.errors import SatchelError, UnknownName
from satchel.core.knobs import Knob, parse_knobs, read_knobs

PACKAGE = Path(__file__).parent.parent
HOUSE = ("core", "model", "run", "cli", "native", "studies")  # folders that hold no methods
OPTIONAL = ("adapter", "format", "activations", "surgery", "selector", "skip", "kv")  # slots that may be `none`
SLOTS = {seam.__name__: seam.slot for seam in seams.Method.__subclasses__()}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method, as its file says without being imported."""

    slot: str
    name: str
    room: str
    lineage: tuple[tuple[Path, str], ...]  # (file, class) from just below the seam down to the method
    card: Card
    doc: str  # the file's docstring

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return self.doc.partition("\n")[0]

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The method's knobs, those that it inherits from another method first."""
        return tuple({knob.name: knob for path, name in self.lineage for knob in read_knobs(path, name)}.values())

    @property
    def path(self) -> Path:
        """The method's file."""
        return PACKAGE / self.room / f"{self.name}.py"

    def load(self) -> type[seams.Method]:
        """Import the file and give the method's class."""
        return getattr(importlib.import_module(f"satchel.{self.room}.{self.name}"), self.lineage[-1][1])


def entries() -> list[Entry]:
    """All methods, ordered by slot and name."""
    paths = (path for room in rooms() for path in _method_files(room))
    return sorted(filter(None, map(_read, paths)), key=lambda entry: (entry.slot, entry.name))


def rooms() -> list[Path]:
    """The folders that hold methods."""
    folders = (path for path in PACKAGE.iterdir() if (path / "__init__.py").exists())
    return sorted(path for path in folders if path.name not in HOUSE)


def slots() -> list[str]:
    """The slots that a job fills, in the order of the seams."""
    return list(SLOTS.values())


def find(slot: str, name: str) -> Entry:
    """The entry of one method. Raises UnknownName with the nearest name in the slot."""
    candidates = (_read(path) for room in rooms() for path in _method_files(room) if path.stem == name)
    for entry in candidates:
        if entry and entry.slot == slot:
            return entry
    if slot not in SLOTS.values():
        raise UnknownName("slot", slot, SLOTS.values())
    known = [entry.name for entry in entries() if entry.slot == slot]
    raise UnknownName(slot, name, known + ["none"] * (slot in OPTIONAL))


def check(slot: str, spelling: str) -> None:
    """Refuse a spelling such as `galore:rnak=64` without importing anything. Raises UserError."""
    _parse(slot, spelling)


@overload
def make(slot: Literal["adapter"], spelling: str) -> seams.Adapter | None: ...
@overload
def make(slot: Literal["admission"], spelling: str) -> serve_seams.Admission: ...
@overload
def make(slot: Literal["decoding"], spelling: str) -> serve_seams.Decoding: ...
@overload
def make(slot: Literal["activations"], spelling: str) -> seams.Activations | None: ...
@overload
def make(slot: Literal["selector"], spelling: str) -> seams.Selector | None: ...
@overload
def make(slot: Literal["surgery"], spelling: str) -> seams.Surgery | None: ...
@overload
def make(slot: Literal["format"], spelling: str) -> seams.WeightFormat | None: ...
@overload
def make(slot: Literal["checkpoint"], spelling: str) -> seams.Checkpoint: ...
@overload
def make(slot: Literal["objective"], spelling: str) -> seams.Objective: ...
@overload
def make(slot: Literal["optimizer"], spelling: str) -> seams.OptimizerMethod: ...
@overload
def make(slot: Literal["preemption"], spelling: str) -> serve_seams.Preemption: ...
@overload
def make(slot: Literal["schedule"], spelling: str) -> seams.Schedule: ...
@overload
def make(slot: Literal["mixture"], spelling: str) -> seams.Mixture: ...
@overload
def make(slot: Literal["skip"], spelling: str) -> serve_seams.Skip | None: ...
@overload
def make(slot: Literal["kv"], spelling: str) -> serve_seams.KV | None: ...
@overload
def make(slot: str, spelling: str) -> seams.Method | None: ...
def make(slot: str, spelling: str) -> seams.Method | None:
    """The method that `galore:rank=64` spells; None for `none` in a slot that may stay empty.

    Imports that one file. Raises UnknownName for a method or knob that does not exist, UserError for a bad value.
    """
    parsed = _parse(slot, spelling)
    if parsed is None:
        return None
    entry, values = parsed
    return entry.load()(**values)


def _parse(slot: str, spelling: str) -> tuple[Entry, dict[str, Any]] | None:
    name, _, knobs = spelling.strip().partition(":")
    if name == "none" and slot in OPTIONAL and not knobs:
        return None
    entry = find(slot, name)
    return entry, parse_knobs(knobs, entry.knobs, name)


def _method_files(room: Path) -> Iterator[Path]:
    return (path for path in sorted(room.glob("*.py")) if not path.stem.startswith("_"))


@dataclass(frozen=True)
class _File:
    """What the book needs of a file; its tree is let go, whose many parts Python would look through for cycles."""

    doc: str
    bases: dict[str, str]  # the first base of each class, without the module
    cards: dict[str, Card]
    imports: dict[str, Path]  # the files of our package that names are from


@cache
def _file(path: Path) -> _File:
    """A file, parsed once however many methods derive from what is in it."""
    tree = ast.parse(path.read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    cards = {node.name: card for node in classes if (card := _card(node, path))}
    sources = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    imports = {alias.name: _home(str(node.module)) for node in sources for alias in node.names}
    return _File(ast.get_docstring(tree) or "", {node.name: _base(node) for node in classes}, cards, imports)


@cache
def _read(path: Path) -> Entry | None:
    """The entry of a file; None if no class in it has a card and derives from a seam."""
    for name, card in (file := _file(path)).cards.items():
        *own, (_, seam) = _lineage(path, name)
        if seam in SLOTS:
            lineage = tuple(reversed(own))
            return Entry(
                slot=SLOTS[seam], name=path.stem, room=path.parent.name, lineage=lineage, card=card, doc=file.doc
            )
    return None


def _card(node: ast.ClassDef, path: Path) -> Card | None:
    for statement in node.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="card")], value=ast.Call(keywords=keywords)):
                try:
                    return Card(**{str(k.arg): ast.literal_eval(k.value) for k in keywords})
                except (TypeError, ValueError) as fault:
                    raise SatchelError(f"{path}: the card is not a literal Card: {fault}") from None
            case _:
                pass
    return None


def _base(node: ast.ClassDef) -> str:
    return ast.unparse(node.bases[0]).rpartition(".")[2] if node.bases else "object"


def _home(module: str) -> Path:
    """Where a module of our package lies; a path that does not exist if it is not ours."""
    return PACKAGE.parent / Path(*module.split(".")).with_suffix(".py")


def _lineage(path: Path, class_name: str) -> Iterator[tuple[Path, str]]:
    """(file, class name) from a class up its first bases; the last one is the seam, or whatever stands outside."""
    while class_name not in SLOTS:
        yield path, class_name
        file = _file(path)
        class_name = file.bases.get(class_name, "object")
        if class_name in SLOTS or class_name in file.bases:
            continue
        path = file.imports.get(class_name, PACKAGE / "nowhere")
        if not path.exists():
            break
    yield path, class_name
