"""Moments: ``f(net, draw, n)`` yields lists of batches, measured one after the other with the same model object.

``draw(n)`` gives a batch ``(x, y)`` of ``n``. What was proved while nothing could be seen must not be used when there
is something to see.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import Net

Batches = list[tuple[Tensor, Tensor]]
Draw = Callable[[int], tuple[Tensor, Tensor]]


@contextlib.contextmanager
def zeroed(*parameters: Tensor):
    """Parameters that are zero for a while."""
    kept = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p in parameters:
            p.zero_()
    yield
    with torch.no_grad():
        for p, old in zip(parameters, kept):
            p.copy_(old)


def usual(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    yield [draw(n)]


def several(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    yield [draw(n), draw(n), draw(max(1, n // 2))]


def again(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    for _ in range(3):
        yield [draw(n)]


def growing(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    yield [draw(1)]
    yield [draw(2), draw(n)]
    yield [draw(n + 1)]


def zero_head(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    with zeroed(net.head.weight, net.head.bias):
        yield [draw(n)]
    yield [draw(n)]


def zero_gate(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    with zeroed(net.gate):
        yield [draw(n)]
    yield [draw(n)]


def warm_up(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    for net.coefficient in (0.0, 0.7):
        yield [draw(n)]


def zero_block(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    with zeroed(*net.block.parameters()):
        yield [draw(n)]
    yield [draw(n)]


def dead(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    """A ReLU on a data-dependent gate: shut for the whole first batch, open for some later."""
    x, y = draw(8 * n)
    shut = net.key(x).argsort()[:n]
    net.open = 1.0
    yield [(x[shut], y[shut])]
    yield [draw(n)]
    yield [(x[shut], y[shut]), draw(n)]


def rarely(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    """The gate is open for one example in the middle."""
    x, y = draw(8 * n)
    order = net.key(x).argsort()
    chosen = torch.cat([order[: n // 2], order[-1:], order[n // 2 : n]])
    net.open = 1.0
    yield [(x[chosen], y[chosen])]


def in_order(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    """Sorted by the key first, then as drawn, then backwards."""
    x, y = draw(n)
    order = net.key(x).argsort()
    yield [(x[order], y[order])]
    yield [(x, y)]
    yield [(x[order.flip(0)], y[order.flip(0)]), (x[order], y[order])]


def same(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    """A batch of equal examples first."""
    x, y = draw(1)
    yield [(x.expand(n, *x.shape[1:]).clone(), y.expand(n).clone())]
    yield [draw(n)]


def trained(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    """From a zero head, a few steps of training between two measurements."""
    with torch.no_grad():
        net.head.weight.zero_()
    x, y = draw(n)
    yield [(x, y)]
    parameters = [p for p in net.parameters() if p.requires_grad]
    for _ in range(3):
        grads = torch.autograd.grad(F.cross_entropy(net(x), y), parameters, allow_unused=True)
        with torch.no_grad():
            for p, g in zip(parameters, grads):
                p.sub_(0 if g is None else 0.5 * g)
    yield [(x, y)]


def frozen_then_not(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    net.block.requires_grad_(False)
    yield [draw(n)]
    net.block.requires_grad_(True)
    yield [draw(n)]


def exchanged(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    """A block of known operations first, the real one later."""
    real, net.block = net.block, nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double()
    yield [draw(n)]
    net.block = real
    yield [draw(n)]


def inference(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    with torch.inference_mode():
        x, y = (t.clone() for t in draw(n))
    yield [(x, y)]


def alone(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    yield [draw(1) for _ in range(n)]


def hook_later(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    """A gradient hook on a parameter comes and goes."""
    yield [draw(n)]
    handle = net.head.weight.register_hook(lambda g: 3 * g)
    yield [draw(n)]
    handle.remove()
    yield [draw(n)]


def replaced(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    """Another parameter object in the place of one."""
    yield [draw(n)]
    net.head.weight = nn.Parameter(1.5 * net.head.weight.detach())
    yield [draw(n)]


def with_gradients(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    """Gradients of a training step are there, and stay."""
    x, y = draw(n)
    F.cross_entropy(net(x), y).backward()
    yield [draw(n)]


def without_gradients(net: Net, draw: Draw, n: int) -> Iterator[Batches]:
    """Autograd is switched off where the library is called."""
    with torch.no_grad():
        yield [draw(n)]


MOMENTS = {
    "usual": usual,
    "several batches": several,
    "again": again,
    "growing": growing,
    "one at a time": alone,
    "zero head": zero_head,
    "zero gate": zero_gate,
    "zero block": zero_block,
    "warm-up from zero": warm_up,
    "dead at first": dead,
    "rarely open": rarely,
    "in order at first": in_order,
    "equal at first": same,
    "trained": trained,
    "frozen at first": frozen_then_not,
    "exchanged": exchanged,
    "hook later": hook_later,
    "parameter replaced": replaced,
    "gradients present": with_gradients,
    "no_grad": without_gradients,
    "inference inputs": inference,
}
