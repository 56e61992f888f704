"""What a loop does when memory runs short: the same rows in smaller pieces, so that the result stays the same."""

from __future__ import annotations

import torch

from satchel.core.errors import JobError
from satchel.run.memory import resident_bytes

OVER_BUDGET = "satchel memory budget"  # what our allocator's refusals say


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller piece of work may succeed where this one failed."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or OVER_BUDGET in str(error)


class Governor:
    """Asked before each step and after each failure. This one halves; a subclass may act before the limit."""

    def before_step(self, rows: int) -> int:
        """Rows at once for the next step; `rows` is what the last one had."""
        return rows

    def after_failure(self, error: Exception, rows: int) -> int:
        """Fewer rows at once than the `rows` that failed. Raises `error` itself if memory was not its cause."""
        if not is_out_of_memory(error):
            raise error
        if rows == 1:
            raise JobError("out of memory with one row at a time; shorten context or raise memory") from error
        return (rows + 1) // 2

    def memory_bytes(self) -> int:
        """Memory in use, for the metrics: of the GPU if there is one at work, else this process's resident bytes."""
        return torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else resident_bytes()
