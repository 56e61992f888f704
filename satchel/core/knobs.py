"""The fields of a dataclass as its source has them: name, type, default, and the comment behind each.

Read with `ast` and `tokenize`, so that a file that imports torch costs nothing to list. Methods' knobs, the job's keys
and the command line's options all come from here: no knob is written down twice.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from satchel.core.errors import UnknownName, UserError

REQUIRED = object()  # the default of a field that has none
RANGE = re.compile(r"([\[(])(-?[\d.e-]+), (-?[\d.e-]+|inf)([\])])$")  # at the end of a comment: `share kept, (0, 1]`


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One field: `rank: int = 8  # width of the update, [1, width]`."""

    name: str
    kind: str  # the annotation: int, float, bool, str, tuple[int, ...], Literal['a', 'b'], or one of these `| None`
    default: Any  # REQUIRED where there is none
    comment: str = ""

    def parse(self, text: str, where: str) -> Any:
        """The value that `text` spells on a command line. Raises UserError, naming `where`."""
        return self._checked(_parse, text, where)

    def accept(self, value: Any, where: str) -> Any:
        """The value itself if it is of the knob's kind; an integer where a float is due becomes one, and one value
        where several may stand a tuple of it."""
        return self._checked(_accept, value, where)

    def holds(self, value: Any) -> bool:
        """Whether a number lies in the range that the comment ends with; true of all else."""
        found = RANGE.search(self.comment)
        if not found or not isinstance(value, int | float):
            return True
        low, high = float(found[2]), float(found[3])
        return (low <= value if found[1] == "[" else low < value) and (
            value <= high if found[4] == "]" else value < high
        )

    def _checked(self, read: Callable[[ast.expr, Any], Any], given: Any, where: str) -> Any:
        try:
            value = read(ast.parse(self.kind, mode="eval").body, given)
        except ValueError:
            raise UserError(self._complaint(given, where)) from None
        if not self.holds(value):
            raise UserError(f"{where}: {self.name}={given} is outside its range: {self.comment}")
        return value

    def _complaint(self, value: Any, where: str) -> str:
        example = "" if self.default is REQUIRED else f", such as the default {self.default!r}"
        return f"{where}: {self.name}={value!r} is not of type {self.kind}{example}"


@cache
def read_knobs(path: Path, class_name: str) -> tuple[Knob, ...]:
    """The annotated fields of one class of a file, in order, without those of its bases."""
    source = path.read_text()
    body = next(n.body for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == class_name)
    comments = _comments(source)
    return tuple(
        Knob(
            name=node.target.id,
            kind=ast.unparse(node.annotation),
            default=REQUIRED if node.value is None else _literal(node.value),
            comment=comments.get(node.end_lineno or node.lineno, ""),
        )
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not _is_class_level(node)
    )


def parse_knobs(text: str, knobs: tuple[Knob, ...], where: str) -> dict[str, Any]:
    """`rank=8,alpha=16` as values by name. Raises UnknownName for a name and UserError for a value or a missing '='."""
    known = {knob.name: knob for knob in knobs}
    values: dict[str, Any] = {}
    for term in filter(None, (t.strip() for t in text.split(","))):
        name, equals, value = (part.strip() for part in term.partition("="))
        if name not in known:
            raise UnknownName("knob", name, known, where)
        if not equals:
            raise UserError(f"{where}: '{term}' lacks a value; write {name}={known[name].default}")
        if name in values:
            raise UserError(f"{where}: {name} is given twice")
        values[name] = known[name].parse(value, where)
    return values


def _is_class_level(node: ast.AnnAssign) -> bool:
    return "ClassVar" in ast.unparse(node.annotation)


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


def _comments(source: str) -> dict[int, str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}


def _parse(kind: ast.expr, text: str) -> Any:
    """ValueError where `text` spells no value of the kind."""
    match kind:
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            return None if text.lower() == "none" else _parse(left, text)
        case ast.Subscript(value=ast.Name(id="Literal")):
            return _accept(kind, text)
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[item, *_])):
            return tuple(_parse(item, part) for part in text.split("+") if part)
        case ast.Name(id="bool"):
            return {"true": True, "false": False}.get(text.lower()) if text.lower() in ("true", "false") else _refuse()
        case ast.Name(id="int"):
            return int(text)
        case ast.Name(id="float"):
            return float(text)
        case _:
            return text


def _accept(kind: ast.expr, value: Any) -> Any:
    """ValueError where `value` is not of the kind."""
    match kind:
        case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
            return None if value is None else _accept(left, value)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            options = ast.literal_eval(choices)
            return value if value in (options if isinstance(options, tuple) else (options,)) else _refuse()
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[item, *_])):
            return tuple(_accept(item, v) for v in (value if type(value) in (list, tuple) else (value,)))
        case ast.Name(id="float"):
            return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else _refuse()
        case ast.Name(id=name):
            return value if type(value).__name__ == name else _refuse()
        case _:
            return value


def _refuse() -> Any:
    raise ValueError


def accept_all(knobs: Iterable[Knob], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a mapping, each of its knob's kind. Raises UnknownName for a key, UserError for a missing one."""
    known = {knob.name: knob for knob in knobs}
    for name in values:
        if name not in known:
            raise UnknownName("key", name, known, where)
    for name, knob in known.items():
        if knob.default is REQUIRED and not values.get(name):
            raise UserError(f"{where}: '{name}' is missing; it is {knob.comment}")
    return {name: known[name].accept(value, where) for name, value in values.items()}
