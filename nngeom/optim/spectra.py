"""What stands for eigenvalues in kept eigenbases: second moments of examples, of gradients, or those of the factors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from nngeom.core.errors import ArgumentError, NonFiniteError
from nngeom.optim.manner import Manner
from nngeom.optim.pending import Seen

Moved = Callable[..., Tensor]  # coordinates ``[p]`` in the last bases -> in the new ones; ``squared``: of mean squares


class Spectrum(ABC):
    """Numbers ``d [p]`` along the eigenvectors, which follow every step.

    Gradients are divided by ``(d + damping)**power``.

    Subclasses say :meth:`follow`, and register under :func:`spectrum`. ``d`` is changed in place: blocks are views of
    it.

    Args:
        manner: what the optimizer's options say.
    """

    factored: ClassVar[bool] = True  # whether damping may be that of factors, and the spectrum that of a leading part
    starts_anew: ClassVar[bool] = True  # from the factors' eigenvalues, in every new basis
    reads_rows: ClassVar[bool] = False  # whether the examples of every batch are squared in the bases

    def __init__(self, manner: Manner):
        self.manner, self.d = manner, torch.zeros(0)

    def start(self, d: Tensor, moved: Moved | None) -> None:
        """New bases, in which the factors have the eigenvalues ``d [p]``; ``moved`` brings what was kept in the last
        ones along, where there were some.
        """
        self.d = d

    @abstractmethod
    def follow(self, v: Tensor, seen: Seen, past: float, squares: Tensor | None) -> Tensor:
        """Take in the gradient ``v [p]`` of a step in the bases, and give what is to be divided; ``seen``: what was
        observed; ``past``: the weight of the past; ``squares [p]``: means over the examples, where they are read.
        """

    def divided(self, v: Tensor, shift: Tensor | float) -> Tensor:
        """``v [p]`` over the damped spectrum, ``shift`` being what damping adds; zero over zero is zero."""
        damped = (self.d + shift).clamp_min_(torch.finfo(v.dtype).tiny)
        if self.manner.power == 1.0:
            return torch.div(v, damped, out=damped)
        return damped.pow_(-self.manner.power).mul_(v)

    def state(self) -> dict[str, Any]:
        """What is kept besides ``d``, as plain values and tensors."""
        return {}

    def load(self, state: dict[str, Any]) -> None:  # noqa: B027  nothing is kept by default
        """The inverse of :meth:`state`, which gave ``state``."""


SPECTRA: dict[str, type[Spectrum]] = {}
Kind = TypeVar("Kind", bound=Spectrum)


def spectrum(name: str) -> Callable[[type[Kind]], type[Kind]]:
    """A decorator: this :class:`Spectrum` is what ``scalings=name`` asks for."""

    def register(kind: type[Kind]) -> type[Kind]:
        SPECTRA[name] = kind
        return kind

    return register


def require_spectrum(name: str) -> None:
    """Raise :class:`ArgumentError` for a ``name`` that nothing is registered under."""
    if not isinstance(name, str) or name not in SPECTRA:
        raise ArgumentError(
            f"scalings is {name!r}; expected one of {sorted(SPECTRA)}, or the name of one of your own "
            "(nng.optim.spectrum)"
        )


def spectrum_of(manner: Manner) -> Spectrum:
    """The spectrum that a ``manner`` asks for."""
    if manner.own_rows and manner.scalings == "running":  # the squared gradient is not that of the metric
        return RunningMoments(manner)
    return SPECTRA[manner.scalings](manner)


@spectrum("batch")
class BatchMoments(Spectrum):
    """The second moments of the batch's examples along the eigenvectors (EKFAC; George et al. 2018, Algorithm 1)."""

    reads_rows = True

    def follow(self, v: Tensor, seen: Seen, past: float, squares: Tensor | None) -> Tensor:
        if squares is not None:
            self.d.copy_(squares)
        return v


class RunningMoments(Spectrum):
    """A running average of :class:`BatchMoments`, starting from the factors' eigenvalues in every new basis."""

    reads_rows = True

    def follow(self, v: Tensor, seen: Seen, past: float, squares: Tensor | None) -> Tensor:
        if squares is not None:
            self.d.lerp_(squares, 1 - past)
        return v


@spectrum("running")
class RunningSquares(Spectrum):
    """``d <- past d + (1 - past) n v^2`` (EKFAC-ra), starting from the factors' eigenvalues in every new basis."""

    def follow(self, v: Tensor, seen: Seen, past: float, squares: Tensor | None) -> Tensor:
        n = seen.examples * seen.mean**2
        if not n * float(torch.dot(v, v)) <= torch.finfo(v.dtype).max / 2:  # infinity would stay, and stop coordinates
            raise NonFiniteError("the squared gradient in the eigenbasis overflows")
        self.d.mul_(past).addcmul_(v, v, value=(1 - past) * n)
        return v


@spectrum("factors")
class FactorSpectrum(Spectrum):
    """The products of the factors' eigenvalues: KFAC; with factors of gradients and a power, Shampoo (Gupta et al.
    2018; Morwani et al. 2024).
    """

    def follow(self, v: Tensor, seen: Seen, past: float, squares: Tensor | None) -> Tensor:
        return v


@spectrum("adam")
class AdamMoments(Spectrum):
    """Adam in the eigenbasis (SOAP; Vyas et al. 2024): ``m / (sqrt(d) + damping)``, both moments corrected for their
    start at zero and moved along to new bases.

    ``past`` is that of the squares ``d``; that of ``m`` is ``first_decay`` of the manner.
    """

    factored = starts_anew = False

    def __init__(self, manner: Manner):
        super().__init__(manner)
        self.m, self.weights = torch.zeros(0), [0.0, 0.0]

    def start(self, d: Tensor, moved: Moved | None) -> None:
        if moved is None or not self.m.numel():
            self.d, self.m, self.weights = torch.zeros_like(d), torch.zeros_like(d), [0.0, 0.0]
        else:
            self.d, self.m = moved(self.d, squared=True), moved(self.m)

    def follow(self, v: Tensor, seen: Seen, past: float, squares: Tensor | None) -> Tensor:
        decays, v = (self.manner.first_decay, past), v * seen.mean
        self.m.lerp_(v, 1 - decays[0])
        self.d.mul_(past).addcmul_(v, v, value=1 - past)
        self.weights = [decay * w + 1 - decay for decay, w in zip(decays, self.weights)]
        return self.m

    def divided(self, v: Tensor, shift: Tensor | float) -> Tensor:
        first, second = self.weights
        return v / ((self.d / second).sqrt_().add_(shift).mul_(first))

    def state(self) -> dict[str, Any]:
        return {"m": self.m, "weights": list(self.weights)}

    def load(self, state: dict[str, Any]) -> None:
        self.m, self.weights = state["m"].clone(), list(state["weights"])
