"""Which iterative solver a matrix takes, with its settings."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from nngeom.core.errors import ArgumentError
from nngeom.solve.cg import conjugate_gradient
from nngeom.solve.minres import minres

Act = Callable[[Tensor], Tensor]


def iterative(
    tol: float,
    max_steps: int | None,
    preconditioner: Act | None = None,
    x0: Tensor | None = None,
    *,
    strict: bool = True,
    indefinite: bool = False,
) -> Callable[[Act, Tensor], Tensor]:
    """``solver(matrix, b)``: MINRES where ``indefinite``, else conjugate gradients.

    The first guess ``x0`` is of the first call; later ones, of gradients, have other right-hand sides. Raises
    :class:`ArgumentError` for a preconditioner of MINRES, and a guess of another shape than ``b``.
    """
    if indefinite and preconditioner is not None:
        raise ArgumentError("indefinite=True takes no preconditioner; leave one of them out")
    guesses = [] if x0 is None else [x0.detach()]

    def solver(matrix: Act, b: Tensor) -> Tensor:
        guess = guesses.pop() if guesses else None
        if guess is not None and guess.shape != b.shape:
            raise ArgumentError(f"x0 has shape {tuple(guess.shape)}; expected that of b, {tuple(b.shape)}")
        if indefinite:
            return minres(matrix, b, tol, max_steps, guess, strict=strict)
        return conjugate_gradient(matrix, b, tol, max_steps, preconditioner, guess, strict=strict)

    return solver
