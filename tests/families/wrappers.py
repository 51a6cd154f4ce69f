"""Wrappers: how the same function of the same parameters is handed to the library."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .net import Net


@dataclass
class Wrapped:
    """``model`` and ``function`` as the library gets them, ``call`` as plain autograd runs them; a tolerance."""

    model: nn.Module
    call: Callable[[Tensor], Tensor]
    function: Callable[..., Tensor] | None = None
    tolerance: float = 1e-6


def through(net: Net, call: Callable[[Tensor], Tensor]) -> Wrapped:
    """Given as ``function=``."""
    return Wrapped(net, call, lambda x, *targets: call(x))


class Checkpointed(nn.Module):
    """Recomputed while going backward; the reentrant kind sees no inputs but floats that require a gradient."""

    def __init__(self, net: Net, reentrant: bool):
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x):
        x = x.detach().requires_grad_() if self.reentrant and x.is_floating_point() else x
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


def scripted(net: Net) -> Wrapped:
    """The head as a scripted module, its parameters shared."""
    net.head = torch.jit.script(net.head)
    return Wrapped(net, net)


def autocast(net: Net) -> Wrapped:
    """float32 parameters, products in bfloat16."""
    net.float()

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x).float()

    return Wrapped(net, call, lambda x, *targets: call(x), tolerance=0.1)


def single(net: Net) -> Wrapped:
    """All in float32."""
    net.float()
    return Wrapped(net, net, tolerance=2e-3)


def closure(net: Net) -> Wrapped:
    """A weight held by a closure, used beside the model."""
    weight = net.head.weight
    return through(net, lambda x: net(x) + F.linear(net.body(x).tanh(), weight))


def listed(net: Net) -> Wrapped:
    """Parameters in a Python list, not looked up on the model."""
    held = [net.head.weight, net.head.bias]
    return through(net, lambda x: F.linear(net.body(x).tanh(), *held))


def hooked(net: Net) -> Wrapped:
    """Gradient hooks on parameters."""
    for p in (net.head.weight, *net.block.parameters()):
        p.register_hook(lambda g: 3 * g)
    return Wrapped(net, net)


def reversal(net: Net) -> Wrapped:
    """A hook on the head's inputs that turns the gradient round, as in adversarial domain adaptation."""

    def turn(module, args):
        if args[0].requires_grad:
            args[0].register_hook(lambda g: -0.5 * g)

    net.head.register_forward_pre_hook(turn)
    return Wrapped(net, net)


def reshaping(net: Net) -> Wrapped:
    """A forward hook that changes the outputs by another use of a parameter."""
    net.head.register_forward_hook(lambda module, args, out: out + F.linear(args[0].square(), module.weight))
    return Wrapped(net, net)


def named(net: Net) -> dict[str, Tensor]:
    """Parameters by name."""
    return dict(net.named_parameters())


def detached(net: Net) -> Wrapped:
    """Run on copies: nothing of the model is reached."""
    copies = lambda: {k: p.detach().clone().requires_grad_() for k, p in named(net).items()}
    return through(net, lambda x: functional_call(net, copies(), (x,)))


def copied(net: Net) -> Wrapped:
    """A deep copy is run."""
    other: Any = copy.deepcopy(net)
    return through(net, lambda x: other(x))


def partly(net: Net) -> Wrapped:
    """The block alone is run on copies."""
    held = lambda: {k: p.detach() for k, p in named(net).items() if k.startswith("block")}
    return through(net, lambda x: functional_call(net, held(), (x,)))


def mapped(net: Net) -> Wrapped:
    """One example at a time under ``vmap``."""
    one = lambda x: net(x[None])[0]
    return through(net, lambda x: torch.func.vmap(one)(x))


def stacked(net: Net) -> Wrapped:
    """The two halves of a batch run apart."""
    return through(net, lambda x: torch.cat([net(part) for part in x.tensor_split(2) if len(part)]))


def compiled(net: Net, backend: str) -> Wrapped:
    """Traced anew: a function compiled for too many models is no longer compiled at all."""
    torch.compiler.reset()
    return Wrapped(torch.compile(net, backend=backend), net)


WRAPPERS: dict[str, Callable[[Net], Wrapped]] = {
    "plain": lambda net: Wrapped(net, net),
    "in halves": stacked,
    "checkpointed": lambda net: Wrapped(Checkpointed(net, reentrant=False), net),
    "reentrant": lambda net: Wrapped(Checkpointed(net, reentrant=True), net),
    "scripted": scripted,
    "autocast": autocast,
    "float32": single,
    "parameters passed": lambda net: through(net, lambda x: functional_call(net, named(net), (x,))),
    "detached copies": detached,
    "deep copy": copied,
    "block detached": partly,
    "closure": closure,
    "list": listed,
    "parameter hooks": hooked,
    "gradient reversal": reversal,
    "forward hook": reshaping,
    "vmap": mapped,
    "compiled eager": lambda net: compiled(net, "eager"),
    "compiled aot": lambda net: compiled(net, "aot_eager"),
}
SLOW = ("compiled eager", "compiled aot")
# members whose gradients are those of no function, or too rough: second derivatives cannot be compared
ODD = {"parameter hooks", "gradient reversal", "block detached", "hook later", "batch statistics", "codes"}
NO_SECOND = {*ODD, "autocast"}
