"""Eigenvalues with a damping: which count as zero, their reciprocals and logarithms, and definite factors."""

from __future__ import annotations

import torch
from torch import Tensor

from nngeom.core import linalg
from nngeom.core.damping import Cutoff, Damping, Tikhonov
from nngeom.core.errors import SingularError

SPECTRUM_LIMIT = 4096  # a longer side takes too long for an error to say how much damping is needed


def reciprocal(values: Tensor, damping: Damping, what: str) -> Tensor:
    """``1 / (values + damping)``, or the pseudo-inverse under :class:`Cutoff`; raises :class:`SingularError`.

    ``what``: what the error calls the matrix.
    """
    if isinstance(damping, Cutoff):
        keep = values >= max(damping.value, torch.finfo(values.dtype).tiny)
        return torch.where(keep, 1 / torch.where(keep, values, torch.ones_like(values)), torch.zeros_like(values))
    shifted = values + damping.value
    if isinstance(damping, Tikhonov) and damping.indefinite:
        require_nonzero(shifted, values, what)
    else:
        require_positive(shifted, values, what)
    return 1 / shifted


def relative_shift(sa: Tensor, sg: Tensor, c: float | Tensor) -> Tensor:
    """``(s_A + c m_A) (s_G + c m_G) - s_A s_G`` of eigenvalues ``sa [s, 1, i]``, ``sg [s, o, 1]`` with means ``m``."""
    ma, mg = sa.mean(-1, keepdim=True), sg.mean(-2, keepdim=True)
    return c * c * ma * mg + c * (sa * mg + ma * sg)


def require_positive(shifted: Tensor, values: Tensor, what: str) -> None:
    """Raise unless all of ``shifted`` is above rounding error of ``values``."""
    if not values.numel():
        return
    floor, least = rounding(values), shifted.min()
    if bool(least <= floor):
        need = ((shifted - values).max() - least + floor).item()
        raise SingularError(
            f"{what} is singular or indefinite at this damping: its smallest eigenvalue is {least.item():.3e}; "
            f"use a damping above {max(need, 0.0):.3e}, or Cutoff(x) for a pseudo-inverse",
            max(need, 0.0),
        )


def require_nonzero(shifted: Tensor, values: Tensor, what: str) -> None:
    """Raise unless all of ``shifted`` differ from zero by more than rounding error of ``values``."""
    if values.numel() and bool(shifted.abs().min() <= rounding(values)):
        raise SingularError(f"{what} is singular at this damping; use another, or Cutoff(x) for a pseudo-inverse")


def by_eigenvalues(damping: Damping) -> bool:
    """Whether the inverse takes eigenvalues, for a Cholesky factorisation would not do."""
    return isinstance(damping, Cutoff) or (isinstance(damping, Tikhonov) and damping.indefinite)


def definite_factor(m: Tensor, damping: Damping, what: str) -> Tensor:
    """The Cholesky factor of ``m + damping I``, ``m [..., p, p]``; raises :class:`SingularError` with the need."""
    try:
        return linalg.cholesky(*shifted(m, damping, what))
    except SingularError:
        if m.shape[-1] <= SPECTRUM_LIMIT:
            values = torch.linalg.eigvalsh(m.detach().double()).to(m.dtype)
            require_positive((values + damping.value).detach(), values, what)
        raise


def shifted(m: Tensor, damping: Damping, what: str) -> tuple[Tensor, str]:
    """``m + damping I``, and what to call it where it is singular."""
    total = m.clone()
    total.diagonal(dim1=-2, dim2=-1).add_(damping.value)
    return total, f"{what} with damping {damping.value:g}"


def rounding(values: Tensor) -> Tensor:
    """What of eigenvalues counts as zero: their rounding error, 4 units in the last place of the largest."""
    return 4 * torch.finfo(values.dtype).eps * values.abs().max()


def shifted_logdet(values: Tensor, damping: Tikhonov) -> Tensor:
    """``sum log(values + damping)``; without damping ``-inf`` where :func:`require_positive` raises."""
    shifted = values + damping.value
    if values.numel() and not damping.value > 0:
        shifted = torch.where(values <= rounding(values), torch.zeros_like(values), shifted)
    return log_sum(shifted)


def log_sum(shifted: Tensor) -> Tensor:
    """``sum log``; ``-inf`` where one is not positive."""
    return shifted.clamp_min(0).log().sum()


def zero_small(values: Tensor) -> Tensor:
    """Eigenvalues within rounding error of zero set to it: the log-determinant of a singular matrix is ``-inf``."""
    floor = values.shape[-1] * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    return torch.where(values.abs() <= floor, torch.zeros_like(values), values)
