"""The rules that hold for every file: who may import whom, how long things get, and what the public sees."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import satchel
from satchel.cli.main import app
from satchel.core import book
from satchel.core.knobs import REQUIRED

PACKAGE = Path(satchel.__file__).parent
TESTS = Path(__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
ORDER = ("core", "model", "rooms", "run", "cli")  # each may import those before it, and itself
TREES = {path: ast.parse(path.read_text()) for path in FILES}

FILE_LINES, FUNCTION_LINES = 400, 60

JOB_FLAGS = """
    --config --model --data --out --eval-data --eval-share --eval-rows --device --memory --dtype --adapter --optimizer
    --schedule --activations --surgery --format --objective --checkpoint --lr --context --batch --micro-batch --steps
    --epochs --clip --seed --eval-every --save-every --resume --no-resume --branch --merge --no-merge
"""
TUNE_FLAGS = JOB_FLAGS + "--packing --no-packing "
PRETRAIN_FLAGS = JOB_FLAGS + "--scratch --no-scratch --tokenizer --mixture --selector "
ENGINE_FLAGS = """
    --config --model --device --memory --dtype --format --context --batch --step-tokens --admission --preemption
    --decoding --skip --kv --seed --adapters
"""
SERVE_FLAGS = ENGINE_FLAGS + "--host --port --api-keys --queue --timeout --drain --max-body --replicas"
FLAGS = {  # frozen: a new knob of a method needs none; a change here breaks somebody's script
    "batch": ENGINE_FLAGS,
    "bench": "",
    "chat": "--adapter --prompt --system --raw --max-tokens --temperature --top-p --seed --dtype --device",
    "doctor": "",
    "list": "--json",
    "merge": "",
    "plan pretrain": PRETRAIN_FLAGS + "--explain --json",
    "plan tune": TUNE_FLAGS + "--explain --json",
    "pretrain": PRETRAIN_FLAGS,
    "serve": SERVE_FLAGS,
    "show": "",
    "tune": TUNE_FLAGS,
}
PUBLIC = """
    Budget DataError DoesNotFit JobError ModelError PretrainJob Report SatchelError ServeJob Serving Terms TuneJob
    UnknownName UserError generate load load_tokenizer merge plan pretrain save tune __version__
"""


def stratum(module: str) -> str:
    """The layer of `satchel.adapt.lora`: rooms."""
    folder = (module.split(".") + [""])[1]
    if folder == "__main__":
        return "cli"
    return folder if folder in (*ORDER, "native") else "rooms" if folder else "satchel"


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> list[tuple[ast.AST, str]]:
    """(node, module) of every import of ours, but for those of type checkers."""
    skipped = {id(n) for t in ast.walk(tree) if is_type_checking(t) for n in ast.walk(t)}
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [(node, node.module)] + [(node, f"{node.module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(node, alias.name) for alias in node.names]
    return [(node, name) for node, name in found if name.split(".")[0] == "satchel"]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def each_file(test):
    return pytest.mark.parametrize("path", FILES, ids=[str(p.relative_to(PACKAGE)) for p in FILES])(test)


@each_file
def test_imports_point_one_way(path):
    mine = stratum(module_of(path))
    if mine in ("satchel", "native"):
        return
    for _, name in imports(TREES[path]):
        theirs = stratum(name)
        if theirs == "native":
            assert mine in ("model", "rooms", "run", "cli"), f"{path} imports {name}"
        elif theirs != "satchel":
            assert ORDER.index(theirs) <= ORDER.index(mine), f"{path} imports {name}"


@each_file
def test_loops_meet_methods_by_name_only(path):
    if stratum(module_of(path)) in ("run", "cli", "model", "core"):
        # What a room's own __init__ offers, such as PEFT's layout, is no method; its files are.
        rooms = [name for _, name in imports(TREES[path]) if stratum(name) == "rooms"]
        named = [name for name in rooms if PACKAGE.parent.joinpath(*name.split(".")).with_suffix(".py").exists()]
        assert not named, f"{path} imports {named}; ask the book for it by name"


def test_no_import_goes_in_a_circle():
    known = {module_of(path): path for path in FILES}
    graph = {m: {n for _, n in imports(TREES[p]) if n in known and n != m} for m, p in known.items()}
    while free := [module for module, needs in graph.items() if not needs & graph.keys()]:
        for module in free:
            del graph[module]
    assert not graph, f"circles among {sorted(graph)}"


@each_file
def test_our_own_modules_are_imported_at_the_top(path):
    if stratum(module_of(path)) in ("cli", "satchel"):  # verbs import what they call, so that help needs no torch
        return
    inner = {id(n) for f in functions(TREES[path]) for n in ast.walk(f)}
    late = [name for node, name in imports(TREES[path]) if id(node) in inner]
    assert not late, f"{path} imports {late} within a function"


def test_core_and_the_public_door_need_no_torch():
    modules = [module_of(path) for path in FILES if stratum(module_of(path)) in ("core", "cli", "satchel")]
    names = [m for m in modules if not m.endswith("__main__")]
    code = f"import sys, importlib\nfor m in {names}: importlib.import_module(m)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@each_file
def test_files_and_functions_are_short(path):
    lines = len(path.read_text().splitlines())
    assert lines <= FILE_LINES, f"{path} has {lines} lines"
    for function in functions(TREES[path]):
        length = function.end_lineno - function.lineno + 1
        assert length <= FUNCTION_LINES, f"{path}: {function.name} has {length} lines"


@each_file
def test_whatever_is_public_says_what_it_is(path):
    """Modules, classes, and functions of modules; methods, unless they override one or are a class's own."""
    tree = TREES[path]
    assert ast.get_docstring(tree) or path.name == "__init__.py", f"{path} has no docstring"
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        if "overload" in map(ast.unparse, node.decorator_list):
            continue
        assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


@each_file
def test_nothing_unpickles(path):
    """Reading somebody's file must not run it."""
    calls = {ast.unparse(node.func) for node in ast.walk(TREES[path]) if isinstance(node, ast.Call)}
    modules = {a.name for n in ast.walk(TREES[path]) if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names}
    assert not calls & {"torch.load", "torch.save", "eval", "exec", "np.load", "numpy.load"}, path
    assert not modules & {"pickle", "marshal", "shelve", "dill"}, path


@each_file
def test_nothing_reads_the_environment_below_the_command_line(path):
    if stratum(module_of(path)) != "cli":
        assert not re.search(r"os\.environ|getenv|putenv", path.read_text()), f"{path} reaches for the environment"


each_method = pytest.mark.parametrize("entry", book.entries(), ids=lambda e: f"{e.slot}-{e.name}")


@each_method
def test_a_method_has_a_test_file_of_its_own_that_meets_its_reference(entry):
    path = TESTS / entry.room / f"test_{entry.name}.py"
    assert path.exists(), f"{entry.path} has no {path}"
    met = imported(ast.parse(path.read_text()))
    reference = entry.card.reference.replace("-", "_")
    assert not reference or reference in met, f"{path} does not import {reference}, which {entry.name} must equal"
    assert f"satchel.{entry.room}.{entry.name}" in met, f"{path} does not import {entry.name}"


def imported(tree: ast.AST) -> set[str]:
    """Modules that a test imports, `pytest.importorskip` included, and the packages that they are of."""
    names = set()
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=str(module)):
                names.add(module)
            case ast.Call(func=ast.Attribute(attr="importorskip"), args=[ast.Constant(value=str(module)), *_]):
                names.add(module)
    return names | {name.partition(".")[0] for name in names}


@each_method
def test_a_method_has_explained_knobs(entry):
    assert entry.doc.partition("\n")[0].endswith((".", "?")), f"{entry.path}: the first line is no sentence"
    for knob in entry.knobs:
        assert knob.comment, f"{entry.path}: {knob.name} has no comment"
        assert knob.default is not REQUIRED, f"{entry.path}: {knob.name} has no default"


@pytest.mark.parametrize("room", book.rooms(), ids=lambda room: room.name)
def test_every_file_of_a_room_is_a_method_or_is_named_with_an_underscore(room):
    methods = {entry.path for entry in book.entries()}
    assert {path for path in room.glob("*.py") if not path.name.startswith("_")} <= methods


def test_the_flags_are_frozen():
    assert dict(verbs(get_command(app))) == {verb: sorted(flags.split()) for verb, flags in FLAGS.items()}


def verbs(group, prefix=""):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, f"{prefix}{name} ")
        else:
            flags = [flag for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag.startswith("--")]
            yield prefix + name, sorted(set(flags) - {"--help"})


def test_the_public_names_are_these():
    assert sorted(dir(satchel)) == sorted(PUBLIC.split())


def test_the_type_checkers_names_are_the_public_ones():
    block = next(node for node in TREES[PACKAGE / "__init__.py"].body if is_type_checking(node))
    typed = {alias.asname: node.module.removeprefix("satchel.") for node in block.body for alias in node.names}
    assert typed == satchel.HOMES


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="it has Budget"):
        satchel.tnue  # noqa: B018
