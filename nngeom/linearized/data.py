"""Small synthetic tasks with easy and difficult regions."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, ArgumentTypeError
from nngeom.core.given_plainly import described, require_at_least, require_real, require_whole


def yin_yang(n: int, generator: torch.Generator | None = None, radius: float = 0.3) -> tuple[Tensor, Tensor]:
    """Points ``(n, 2)`` uniform on the square [-1, 1]^2 and their classes 0 or 1: see :func:`yin_yang_label`.

    ``generator``: of the points (torch's global one by default); ``radius``: of the disks.
    """
    require_whole(n, "n", 0)
    x = 2 * torch.rand(n, 2, generator=generator) - 1
    return x, yin_yang_label(x, radius)


def yin_yang_label(x: Tensor, radius: float = 0.3) -> Tensor:
    """Class 0 in the upper half of the plane and 1 below, flipped in two disks around (0.5, -0.5) and (-0.5, 0.5).

    ``x``: points ``(n, 2)``; ``radius``: of the disks. The large uniform regions are easy, the disks difficult. Source:
    George 2023, thesis, fig. 5.1.
    """
    return (x[:, 1] <= 0).long() ^ in_disks(x, radius).long()


def in_disks(x: Tensor, radius: float = 0.3) -> Tensor:
    """Whether a point of ``x (n, 2)`` lies in one of the two disks of this ``radius``, ``(n,)`` booleans."""
    require_at_least(radius, "radius")
    centre = x.new_tensor([0.5, -0.5])
    return ((x - centre).norm(dim=1) < radius) | ((x + centre).norm(dim=1) < radius)


def add_spurious_feature(
    inputs: Tensor,
    labels: Tensor,
    agreement: float,
    strength: float,
    noise: float,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """``(inputs with one more column, attribute)`` for ``inputs (n, features)`` and binary ``labels (n,)``.

    The attribute ``(n,)`` equals the label for exactly ``round(agreement * n)`` examples; the column is ``+-strength``
    by the attribute, plus normal noise of standard deviation ``noise``, drawn by ``generator`` (torch's global one by
    default). Raises :class:`ArgumentError`.
    """
    require_real(strength, "strength")
    require_real(agreement, "agreement")
    require_at_least(noise, "noise")
    if not inputs.is_floating_point():
        raise ArgumentTypeError(f"inputs are {described(inputs)}; expected floating-point numbers, as the column is")
    binary = labels.shape == inputs.shape[:1] and not bool(((labels != 0) & (labels != 1)).any())
    if inputs.ndim != 2 or not 0 <= agreement <= 1 or not binary:
        raise ArgumentError(
            f"inputs have shape {tuple(inputs.shape)}, labels {tuple(labels.shape)} and agreement is {agreement!r}; "
            "expected (n, features), labels 0 or 1, one an example (n,), and a share in [0, 1]"
        )
    n = len(labels)
    against = torch.randperm(n, generator=generator)[round(agreement * n) :]
    attribute = labels.clone().long()
    attribute[against] = 1 - attribute[against]
    column = strength * (2 * attribute - 1) + noise * torch.randn(n, generator=generator)
    return torch.cat([inputs, column.to(inputs).unsqueeze(1)], 1), attribute
