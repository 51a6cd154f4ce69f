"""Whether a loss says of every example what depends on this example alone, asked of its gradients in the outputs.

Other outputs that have a part in it show in the gradient itself. Targets of others, and outputs that carry no gradient,
show where parts of the batch are asked by themselves; a loss that draws numbers, where it is asked once more. One
factor for all examples of a batch, such as one over the sum of all weights, is let pass: it is the loss that was given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from nngeom.capture.batch import take
from nngeom.capture.other_states import OtherStates
from nngeom.core.errors import ArgumentError, CoverageError

LARGE = 2**22  # outputs of a batch, 32 MiB in float64, above which they are not made wider to be asked
_MIXES = (
    "the loss mixes examples: the value of some changes with the outputs or targets of others (a batch mean, a "
    "contrastive loss, shapes that broadcast such as outputs (n, 1) with targets (n,)); expected one number an "
    "example, of its own outputs and targets"
)


class PerExample(Protocol):
    """What is asked: a loss ``(outputs, targets) -> (n,)``."""

    def precisely(self, outputs: Tensor, targets: Any) -> Tensor: ...


def gradient(values: Tensor, f: Tensor, *, create_graph: bool = False) -> Tensor:
    """``d values[i] / d f[i]`` of a loss ``(n,)``, each example's in its own outputs.

    Raises :class:`ArgumentError` where outputs of other examples have a part in it: with every value multiplied by a
    number of its own, every gradient must be. :class:`CoverageError` where values do not depend on ``f`` at all.
    """
    n, several = len(f), len(f) > 1
    g = _grad(values, f, torch.ones_like(values), retain_graph=several or create_graph, create_graph=create_graph)
    if several:
        own = torch.rand(n, generator=torch.Generator().manual_seed(4), dtype=torch.float64).to(f) + 0.5
        weighted = _grad(values, f, own.to(values), retain_graph=create_graph)
        expected = g.detach() * own.view(-1, *[1] * (f.ndim - 1))
        room = torch.finfo(f.dtype).eps ** 0.75 * expected.abs().max()
        if bool(((weighted - expected).abs() > room).any()):
            raise ArgumentError(_MIXES)
    return g


def _grad(values: Tensor, f: Tensor, weights: Tensor, **options: bool) -> Tensor:
    g = torch.autograd.grad(values, f, weights, allow_unused=True, **options)[0] if values.requires_grad else None
    if g is None:
        raise CoverageError(
            "the loss does not depend on the outputs by differentiable operations (.detach(), argmax or a comparison "
            "inside the loss?)"
        )
    return g


@contextlib.contextmanager
def undrawn(outputs: Tensor) -> Iterator[None]:
    """Within: random numbers that a loss draws, by torch, Python or NumPy, leave their states as they were."""
    others = OtherStates()
    try:
        with torch.random.fork_rng([outputs.device] if outputs.is_cuda else []):
            yield
    finally:
        others.put_back()


def require_own(loss: PerExample, outputs: Tensor, targets: Any) -> None:
    """Raise :class:`ArgumentError` where some examples of a batch have another gradient of ``loss`` by themselves (but
    for a factor that all have), or all have another one when they are asked again.

    Of a loss for one size of batch only the latter is asked.
    """
    f = outputs.detach()
    wide = f.double() if f.numel() <= LARGE and f.device.type != "mps" else f
    try:
        try:
            ask = _asked(loss, wide, targets)
            whole = ask(None)
        except RuntimeError:  # a function with tensors of its own, in the dtype of the outputs
            ask = _asked(loss, f, targets)
            whole = ask(None)
        _require_same(ask, whole)
    except CoverageError:  # said where the gradient is taken
        return


def _asked(loss: PerExample, f: Tensor, targets: Any) -> Callable[[list[int] | None], Tensor]:
    """From places of examples (all of the batch) to the gradient of those, asked by themselves."""

    def ask(places: list[int] | None) -> Tensor:
        with torch.enable_grad():
            part = (f if places is None else f[places]).clone().requires_grad_()
            values = loss.precisely(part, targets if places is None else take(targets, places, len(f)))
            return _grad(values, part, torch.ones_like(values))

    return ask


def _require_same(ask: Callable[[list[int] | None], Tensor], whole: Tensor) -> None:
    n, odd = len(whole), False
    for places in _parts(n):
        try:
            odd = odd or not _same(ask(places), whole[places], whole)
        except Exception:  # a loss for one size of batch
            break
    if not _same(ask(None), whole, whole, factor=False):
        raise ArgumentError(
            "the loss changes from one call to the next, on the same outputs and targets: it draws random numbers or "
            "keeps a state; expected a function of outputs and targets alone"
        )
    if odd:
        raise ArgumentError(_MIXES)


def _parts(n: int) -> list[list[int]]:
    """Each half; of few examples all, with some of them twice: one alone does not show what is a factor."""
    if n < 4:
        return [[*range(n), j] for j in (0, n - 1)] if n > 1 else []
    return [list(range(n // 2)), list(range(n // 2, n))]


def _same(part: Tensor, expected: Tensor, whole: Tensor, *, factor: bool = True) -> bool:
    """To rounding, of gradients and of the numbers about one that they are made of."""
    if part.shape != expected.shape:
        return False
    eps = torch.finfo(whole.dtype).eps
    room = eps ** (2 / 3) * float(whole.abs().nan_to_num(posinf=0.0).max()) + 64 * eps
    factors = [1.0]
    if factor:
        factors.append(float((part * expected).sum() / expected.square().sum()))
    return any(torch.allclose(part, x * expected, rtol=eps**0.5, atol=room, equal_nan=True) for x in factors)
