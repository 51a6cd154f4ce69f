"""Chains: models that apply linear maps, convolutions and positively homogeneous activations one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from nngeom.capture.network import Batch, require_finite
from nngeom.core.errors import ArgumentError, LoaderError, StructureError
from nngeom.layers.linear_map import LinearMap, is_linear_map
from nngeom.space.collection import unwrap
from nngeom.sweep.run import Run

RELU = {F.relu, torch.relu, "relu"}
FLATTEN = {torch.flatten, "flatten"}
UNDERSTOOD = (
    "nn.Linear, nn.Conv1d to 3d with zero padding, ReLU, nn.LeakyReLU, flatten from axis 1, nn.Identity, and "
    "nn.Dropout in evaluation mode, one after the other"
)


@dataclass(frozen=True)
class Activation:
    """``x`` where it is positive, ``slope x`` elsewhere."""

    slope: float

    @property
    def lipschitz(self) -> float:
        """The Lipschitz constant."""
        return max(1.0, abs(self.slope))


Step = LinearMap | Activation | None  # None: flattens


@dataclass(frozen=True)
class Chain:
    """The ``steps`` of a model, and the ``shape`` of the input of one example."""

    steps: tuple[Step, ...]
    shape: tuple[int, ...] = ()

    @property
    def maps(self) -> list[LinearMap]:
        """What has weights."""
        return [step for step in self.steps if isinstance(step, LinearMap)]

    @property
    def activations(self) -> list[Activation]:
        """What has none."""
        return [step for step in self.steps if isinstance(step, Activation)]

    def forward(self, x: Tensor, of: Callable[[Tensor], Tensor] = lambda w: w) -> Tensor:
        """The outputs for inputs ``x (n, *shape)`` with the weights and biases that ``of`` makes of each."""
        for step in self.steps:
            if step is None:
                x = x.flatten(1)
            elif isinstance(step, Activation):
                x = torch.where(x > 0, x, step.slope * x)
            else:
                x = step(x, of(step.weight), None if step.bias is None else of(step.bias))
        return x

    def at(self, x: Tensor) -> Chain:
        """The same with the shapes that inputs ``x (n, *shape)`` have on their way."""
        steps: list[Step] = []
        shape = tuple(x.shape[1:])
        for step in self.steps:
            if isinstance(step, LinearMap):
                step.require_input(x)
                step = LinearMap(step.name, step.module, tuple(x.shape[1:]))
            steps.append(step)
            x = Chain((step,)).forward(x)
        return Chain(tuple(steps), shape)

    def require_without_biases(self, what: str, *, ignored: bool) -> None:
        """Raise :class:`ArgumentError` where there are biases, unless they are all zero or ``ignored``."""
        names = [m.name for m in self.maps if m.bias is not None and bool(m.bias.any())]
        if names and not ignored:
            raise ArgumentError(
                f"{what} is defined for networks without biases; {', '.join(names[:4])} have some. Build the model "
                "with bias=False, or pass ignore_biases=True for the number that the weights give (no bound holds then)"
            )


def chain_of(model: nn.Module) -> Chain:
    """The chain that a ``model`` is; raises :class:`StructureError` for a model that is none, and says by what."""
    root = nn.Sequential(unwrap(model))
    hooked = [name for name, m in root.named_modules() if m._forward_hooks or m._forward_pre_hooks]
    if hooked:
        raise StructureError(f"{_own(hooked[0])} has forward hooks, which may change what it computes; remove them")
    try:
        nodes = list(fx.Tracer().trace(root).nodes)
    except Exception as error:
        raise StructureError(
            f"the forward pass of {type(model).__name__} could not be read ({error}); expected {UNDERSTOOD}"
        ) from error
    inputs = [node for node in nodes if node.op == "placeholder"]
    if len(inputs) != 1:
        raise StructureError(f"{type(model).__name__} takes {len(inputs)} inputs; expected one")
    steps: list[Step] = []
    last = inputs[0]
    for node in nodes[1:]:
        if node.all_input_nodes != [last]:
            raise StructureError(
                f"{_named(node)} takes other inputs than the step before it; expected a chain: {UNDERSTOOD}"
            )
        if node.op != "output":
            steps.extend(_steps(node, root))
        last = node
    chain = Chain(tuple(steps))
    if not chain.maps:
        raise StructureError(f"{type(model).__name__} has no linear map; expected {UNDERSTOOD}")
    return chain


def visited(run: Run, chain: Chain) -> Iterator[tuple[Chain, Batch, Tensor, Tensor]]:
    """For every batch: the chain at the shapes of the data, it, its inputs, and outputs ``(n, c)``.

    Raises :class:`StructureError` where the model's outputs are not those of the chain, :class:`LoaderError` for
    inputs of several shapes.
    """
    for index, batch in enumerate(run.batches()):
        x = inputs_of(batch)
        if index == 0:
            chain = chain.at(x[:1])
        elif x.shape[1:] != chain.shape:
            raise LoaderError(f"inputs have shapes {chain.shape} and {tuple(x.shape[1:])}; expected one shape")
        outputs = run.network.run(batch).detach()
        require_finite(outputs, "outputs", index)
        _require_same(outputs, chain.forward(x))
        yield chain, batch, x, outputs


def inputs_of(batch: Batch) -> Tensor:
    """The inputs ``(n, *shape)`` of a batch; raises :class:`LoaderError` where they are no floating-point tensor."""
    x = batch[0] if isinstance(batch, Sequence) else batch
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise LoaderError(f"inputs are {type(x).__name__}; a chain takes one floating-point tensor (n, *shape)")
    return x


def _require_same(outputs: Tensor, ours: Tensor) -> None:
    tol = 1e4 * torch.finfo(outputs.dtype).eps
    if outputs.ndim != 2 or outputs.shape != ours.shape or not torch.allclose(outputs, ours, rtol=tol, atol=tol):
        raise StructureError(
            f"the model's outputs {tuple(outputs.shape)} are not those of its chain of layers {tuple(ours.shape)}: its "
            f"forward pass does something else too; expected {UNDERSTOOD}, with outputs (n, c)"
        )


def _steps(node: fx.Node, root: nn.Module) -> list[Step]:
    if node.op == "call_module":
        return _of_module(str(node.target), root.get_submodule(str(node.target)))
    if node.target in RELU:
        return [Activation(0.0)]
    if node.target in FLATTEN and (*node.args[1:], *node.kwargs.values()) in ((1,), (1, -1)):
        return [None]
    raise StructureError(f"{_named(node)} is not understood; expected {UNDERSTOOD}")


def _of_module(name: str, module: nn.Module) -> list[Step]:
    if is_linear_map(module):
        return [LinearMap.of(_own(name), module)]
    if isinstance(module, nn.ReLU):
        return [Activation(0.0)]
    if isinstance(module, nn.LeakyReLU):
        return [Activation(float(module.negative_slope))]
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
        return [None]
    if isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and not module.training):
        return []
    raise StructureError(f"{_own(name)}, {type(module).__name__}, is not understood; expected {UNDERSTOOD}")


def _named(node: fx.Node) -> str:
    target = node.target
    return _own(target) if isinstance(target, str) else getattr(target, "__name__", repr(target))


def _own(name: str) -> str:
    return name.removeprefix("0.") if name != "0" else "the model"
