"""Relative tolerance of results that should be equal, by dtype: some units in the last place of long sums."""

import torch

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
