"""What was forgotten is computed again.

The plain way: a preempted answer's blocks stay findable until their places are needed, and no longer. Costs the tokens
of prompt and answer once more for each time that they were really lost; takes no memory and no disk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from satchel.core.card import Card
from satchel.core.serve_seams import Arrival, Preemption, Shelf

if TYPE_CHECKING:
    from torch import Tensor


class _Nothing(Shelf):
    """Keeps nothing."""

    def keep(self, digest: bytes, block: int) -> None:
        return

    def has(self, digest: bytes) -> bool:
        return False

    def fetch(self, blocks: Sequence[tuple[bytes, int]]) -> Arrival:
        return _Nobody()


class _Nobody:
    """Who was not there does not arrive."""

    done = True

    def wait(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class Recompute(Preemption):
    """See the file's docstring."""

    card = Card(paper="https://arxiv.org/abs/2309.06180", spends=("compute",))

    def start(self, data: "Tensor") -> Shelf:
        """A shelf that keeps nothing."""
        return _Nothing()
