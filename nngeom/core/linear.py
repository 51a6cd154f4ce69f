"""Linear maps and their inverses as autograd sees them: the gradient of a product is a product, of a solve a solve.

What a map does inside (forward mode, backward passes, conjugate gradients) is hidden from autograd, which sees
``y = A x`` with ``dx = A^T dy``. As backward passes are made of the same functions, there are derivatives of any order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from nngeom.core.errors import UnsupportedError

Act = Callable[[Tensor], Tensor]
Coefficient = float | Tensor


def identity(x: Tensor) -> Tensor:
    """``x``."""
    return x


def differentiated(x: Any) -> bool:
    """Whether derivatives in ``x`` are asked for, in reverse or in forward mode."""
    if not isinstance(x, Tensor):
        return False
    return (x.requires_grad and torch.is_grad_enabled()) or forward_ad.unpack_dual(x).tangent is not None


def linear(act: Act, adjoint: Act, x: Tensor, held: Sequence[Tensor] = ()) -> Tensor:
    """``act(x)``, differentiable in ``x`` whatever ``act`` does; batched over leading axes.

    ``adjoint``: the transposed map. ``held``: tensors that both depend on and that must stay as they are until the
    backward pass, the parameters of a model; it raises ``RuntimeError``, as autograd does, where one was overwritten.
    """
    result: Tensor = _Linear.apply(act, adjoint, tuple(held), x)  # type: ignore[no-untyped-call]
    return result


def symmetric(act: Act, x: Tensor, held: Sequence[Tensor] = ()) -> Tensor:
    """:func:`linear` for a map that is its own transpose."""
    return linear(act, act, x, held)


def solution(
    solver: Callable[[Act, Tensor], Tensor],
    terms: Sequence[tuple[Coefficient, Act]],
    b: Tensor,
    held: Sequence[Tensor] = (),
) -> Tensor:
    """``x`` with ``sum_j c_j A_j x = b``, differentiable in ``b`` and every ``c_j``, for ``terms`` ``(c_j, A_j)``.

    The maps ``A_j`` are symmetric. ``dL/db = l``, the solution for ``dL/dx``, and ``dL/dc_j = -l^T A_j x``.
    ``solver(matrix, b)`` is called without graph. ``held`` as for :func:`linear`.
    Raises :class:`UnsupportedError` where a map has a graph of its own, which would be cut.
    """
    coefficients, maps = zip(*terms)
    numbers = [c.detach() if isinstance(c, Tensor) else c for c in coefficients]
    watch = torch.is_grad_enabled()

    def matrix(y: Tensor) -> Tensor:
        with torch.set_grad_enabled(watch):
            parts = [f(y) for f in maps]
        if any(part.requires_grad for part in parts):
            raise UnsupportedError(
                "an iterative solve has a gradient in its vector, its damping and the factors of its terms, not in the "
                "entries of a matrix that has a graph of its own; detach() that matrix, or work under torch.no_grad()"
            )
        result: Tensor = sum((c * part for c, part in zip(numbers[1:], parts[1:])), numbers[0] * parts[0])
        return result

    result: Tensor = _Solution.apply(lambda y: solver(matrix, y), maps, tuple(held), b, *coefficients)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(act: Act, adjoint: Act, held: tuple[Tensor, ...], x: Tensor) -> Tensor:
        return act(x.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.act, ctx.adjoint, held, _ = inputs
        ctx.save_for_backward(*held)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None, None, None, linear(ctx.adjoint, ctx.act, g, ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _in_reverse()

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, act: Act, adjoint: Act, held: tuple[Tensor, ...], x: Tensor
    ) -> tuple[Tensor, int]:
        return linear(act, adjoint, x.movedim(in_dims[3], 0), held), 0


class _Solution(torch.autograd.Function):
    @staticmethod
    def forward(
        solve: Act, maps: tuple[Act, ...], held: tuple[Tensor, ...], b: Tensor, *coefficients: Coefficient
    ) -> Tensor:
        return solve(b.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.solve, ctx.maps, held, _, *coefficients = inputs
        ctx.numbers = [None if isinstance(c, Tensor) else c for c in coefficients]
        ctx.save_for_backward(output, *(c for c in coefficients if isinstance(c, Tensor)), *held)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        coefficients = [rest.pop(0) if c is None else c for c in ctx.numbers]
        back = _Solution.apply(ctx.solve, ctx.maps, tuple(rest), g, *coefficients)  # type: ignore[no-untyped-call]
        slopes = [
            -(back * symmetric(f, x, rest)).sum().to(c) if isinstance(c, Tensor) and needed else None
            for f, c, needed in zip(ctx.maps, coefficients, ctx.needs_input_grad[4:])
        ]
        return None, None, None, back if ctx.needs_input_grad[3] else None, *slopes

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise _in_reverse()


def _in_reverse() -> UnsupportedError:
    return UnsupportedError(
        "products and solves of implicit objects are differentiated in reverse mode; use backward(), "
        "torch.autograd.grad, "
        "torch.func.grad or jacrev, not forward mode (jvp, jacfwd, torch.func.hessian)"
    )
