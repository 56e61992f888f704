"""Operators in C++ for CPUs, compiled on first use; on torch tensors, for whoever wants them without the rest.

    from satchel.native import gated, rms_norm, rotate, sample

docs/NATIVE.md has them with shapes and examples. Without a C++ compiler they raise UserError; the decoder then does the
same in torch.
"""

from satchel.native.draw import sample
from satchel.native.pointwise import gated, rms_norm, rotate

__all__ = ["gated", "rms_norm", "rotate", "sample"]
