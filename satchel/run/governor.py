"""Keeps a running job inside its memory, and says what gave way: smaller pieces of the same work, for the same result.

On CUDA the allocator's own limit holds. On a CPU the page pool refuses an allocation that would pass the budget, before
the system is asked, and the loop answers by running smaller micro-batches. Without a page pool (no Linux, no compiler)
the resident bytes are read before every step, and the pieces shrink when little is left.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from satchel.core.errors import JobError
from satchel.core.units import format_bytes
from satchel.run.memory import Pool, peak_resident_bytes, reset_peak_resident, resident_bytes

ALARM = 0.95  # share of the budget at which a job without a hard limit gives way
RESERVE = 2 << 20  # bytes by which the rest of the process may grow within a step; 0.2 MiB seen
OVER_BUDGET = "satchel memory budget"  # what the page pool's refusals say


@dataclass
class Governor:
    """The memory of one job. Without a budget it only answers failures."""

    kind: str = "cpu"  # or 'cuda'
    budget_bytes: int | None = None  # of the whole process on that device
    pool: Pool | None = None  # behind the CPU's tensors
    acts: list[str] = field(default_factory=list)  # what it did, for the receipt

    def begin(self) -> None:
        """Start a new peak, and put the limit in force."""
        if self.kind == "cuda":
            torch.cuda.reset_peak_memory_stats()
            if self.budget_bytes:
                torch.cuda.set_per_process_memory_fraction(min(1.0, self.budget_bytes / torch.cuda.mem_get_info()[1]))
            return
        reset_peak_resident()
        if self.pool:
            self.pool.reset_peak()
            self._limit_pool()

    def end(self) -> None:
        """Lift the limit."""
        if self.kind == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0)
        elif self.pool:
            self.pool.limit(None)

    def relax(self) -> None:
        """Give back what the loop no longer needs, before what follows it."""
        if self.kind == "cuda":
            torch.cuda.empty_cache()
        elif self.pool:
            self.pool.trim()

    def memory_bytes(self) -> int:
        """What the job holds now."""
        return torch.cuda.memory_reserved() if self.kind == "cuda" else resident_bytes()

    def peak_bytes(self) -> int:
        """The most it held since `begin`."""
        return torch.cuda.max_memory_reserved() if self.kind == "cuda" else peak_resident_bytes()

    def tensor_peak_bytes(self) -> int | None:
        """The most that its tensors took since `begin`; None where nothing counts them."""
        if self.kind == "cuda":
            return torch.cuda.max_memory_allocated()
        return self.pool.peak_bytes if self.pool else None

    def before_step(self, rows: int) -> int:
        """Rows at once for the next step; `rows` is what the last one had."""
        if self.kind == "cuda" or self.budget_bytes is None:
            return rows
        if self.pool:
            self._limit_pool()  # what lies outside of tensors has grown or shrunk
            return rows
        short = resident_bytes() > ALARM * self.budget_bytes and rows > 1
        return self._halve(rows) if short else rows

    def after_failure(self, error: Exception, rows: int) -> int:
        """Fewer rows at once than the `rows` that failed. Raises `error` itself if memory was not its cause."""
        if not ran_out(error):
            raise error
        if rows == 1:
            budget = f" of {format_bytes(self.budget_bytes)}" if self.budget_bytes else ""
            raise JobError(
                f"out of memory{budget} with one row at a time; shorten context, raise memory, or recompute "
                "with --activations full"
            ) from error
        return self._halve(rows)

    def _halve(self, rows: int) -> int:
        fewer = (rows + 1) // 2
        self.acts.append(f"memory was nearly spent: {fewer} instead of {rows} rows at once from there on")
        if self.kind == "cuda":
            torch.cuda.empty_cache()
        return fewer

    def _limit_pool(self) -> None:
        if self.pool and self.budget_bytes:
            outside = resident_bytes() - self.pool.resident_bytes
            self.pool.limit(max(self.budget_bytes - outside - RESERVE, 1))


def ran_out(error: Exception) -> bool:
    """Whether memory, or the budget of it, was the cause."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or OVER_BUDGET in str(error)
