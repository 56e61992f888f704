"""The card of a method: what the planner, the command line, the docs and the tests need to know of it.

A card is written as a literal in the class body of the method, so that `book` reads it without importing the file.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

ACCOUNTS = (
    "weights",  # the base model's parameters and buffers
    "adapter",  # parameters that the job adds
    "gradients",  # of whatever trains
    "optimizer",  # moments, projections, master copies
    "activations",  # what the forward pass keeps for the backward pass
    "kv",  # the cache of past keys and values
    "workspace",  # temporaries that live within one operator or one chunk, and buffers
)
COSTS = ("compute", "quality", "traffic", "startup", "disk", "stall")  # beside bytes; stall: the loop waits for a disk

Fidelity = Literal["exact", "approx", "study"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """Eight fields; a ninth needs two consumers on the day it lands.

    A dial's cheap end saves the most; towards its neutral end the method comes nearer to the plain job, or spends less.
    The planner turns it to the most neutral value that fits the budget; a knob that is None is the method's own choice.
    """

    paper: str  # URL of the paper or specification
    saves: tuple[str, ...] = ()  # names from ACCOUNTS and COSTS
    spends: tuple[str, ...] = ()  # names from ACCOUNTS and COSTS
    fidelity: Fidelity = "exact"  # exact: the plain job's result; approx: near it; study: never chosen by the planner
    claim: str = ""  # the authors' number, in their conditions
    dial: tuple[str, float, float] | None = None  # the one monotone knob, its cheap end, its neutral end
    reference: str = ""  # a PyPI package whose result it must equal
    demo: dict[str, Any] = field(default_factory=dict[str, Any])  # knobs that make sense on a 1M-parameter model
