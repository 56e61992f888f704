"""What `satchel doctor` says of the native operators: which compile here, and what their absence costs."""

from collections.abc import Callable, Mapping

from rich.table import Table
from rich.text import Text

from satchel.cli.console import table

LOST = {  # what torch does in their place
    "linear": "weights in a GGUF's own blocks are unpacked at every use; `auto` holds them in 16 bits instead",
    "stack": "a run of layers is a call for each operator",
    "paged": "the pages of each sequence are gathered before it attends",
    "pointwise": "norms and rotary positions take several passes each",
    "draw": "a drawn token takes sorts and logarithms of the whole vocabulary",
    "low_rank": "the adapters of a batch are added one after another",
    "adam": "an optimizer's step takes a dozen passes over memory",
    "layout": "a load takes seconds longer",
    "page_pool": "a memory budget counts what the C library's heap loses in holes",
}


def operators() -> Table:
    """Each operator, compiled now if it was not yet, and what does its work where it cannot be."""
    from satchel.native.build import compiler

    cure = "install g++" if compiler() is None else "does not compile here"
    rows = table("native operator", "state", "without it")
    for name, compiles in _builds().items():
        state = Text("ready", "green") if compiles() else Text(cure, "yellow")
        rows.add_row(name, state, LOST[name])
    return rows


def instructions() -> Table:
    """The levels of instructions that products may use: which this processor has, and which gave right results."""
    from satchel.native.levels import LEVELS, supported
    from satchel.native.linear import kernel

    used, rows = kernel(), table("instructions", "this processor", "self-test", "")
    for level in LEVELS:
        has, right = level in supported(), kernel(level) is not None
        tested = Text("passed", "green") if right else Text("did not pass: not used" if has else "-", "yellow")
        mine = "used" if used is not None and used.level == level else ""
        rows.add_row(level, "yes" if has else "no", tested, mine)
    return rows


def _builds() -> Mapping[str, Callable[[], object]]:
    from satchel.native import adam, draw, layout, levels, linear, low_rank, paged, pointwise
    from satchel.native.build import build

    def stack() -> object:
        products = linear.kernel()
        return products and build("stack", levels.flags(products.level))

    libraries = {"paged": paged.library, "pointwise": pointwise.library, "draw": draw.library}
    libraries |= {"low_rank": low_rank.library, "adam": adam.kernel, "layout": layout.library}
    return {"linear": linear.kernel, "stack": stack} | libraries | {"page_pool": lambda: build("page_pool")}
