"""How far what should be equal may differ: the one place where tolerances are written, each with its reason."""

import torch

# Relative error of results that differ in the order of long sums only: some units in the last place.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}

# Rehearsed against allocated bytes: an allocator rounds up to pages, and tables that last as long as the process
# (the codes of 8-bit moments, half a MiB) belong to no job.
REHEARSED = 0.02
