"""What ``torch.load(..., weights_only=True)`` may make: classes of the library that hold tensors and plain values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nngeom.core.registry import LIBRARY
from nngeom.fmat.fmat import FMat
from nngeom.pmat.basis import Basis
from nngeom.pmat.block import Block, BlockBasis
from nngeom.pmat.pmat import PMat, rebuilt
from nngeom.space.collection import Count
from nngeom.tree import PARTS, WHOLE


def trust() -> None:
    """Tell torch of them; a user's own subclasses are told by the user, ``torch.serialization.add_safe_globals``."""
    below = [cls for base in (PMat, FMat, Block, BlockBasis) for cls in _subclasses(base)]
    own = [cls for cls in below if cls.__module__.startswith(LIBRARY)]
    made: list[Callable[..., Any]] = [rebuilt, Count, Basis, *WHOLE, *PARTS, *dict.fromkeys(own)]
    torch.serialization.add_safe_globals(made)  # type: ignore[arg-type]


def _subclasses(cls: type) -> list[type]:
    below: list[type] = cls.__subclasses__()
    return [cls, *(found for sub in below for found in _subclasses(sub))]
