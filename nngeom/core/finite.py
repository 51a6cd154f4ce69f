"""Whether numbers are finite, asked once of many tensors: nearly always their sum tells."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FEW = 2**16  # numbers up to which one sum of copies takes less time than one a tensor: 0.3 to 0.7 of it, 1.4 at 2**18


def all_finite(parts: Sequence[Tensor]) -> bool:
    """Whether no entry of any tensor is NaN or infinite."""
    parts = [part.detach() for part in parts]
    if not parts:
        return True
    few = sum([part.numel() for part in parts]) <= FEW
    total = torch.cat([part.reshape(-1) for part in parts]) if few else torch.stack([part.sum() for part in parts])
    return math.isfinite(total.sum().item()) or all(bool(torch.isfinite(part).all()) for part in parts)
