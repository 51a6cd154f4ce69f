"""One call of the model in training, from its outputs to the backward pass that comes by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from nngeom.core.errors import ArgumentError, UnsupportedError
from nngeom.sweep.passage import Passage
from nngeom.sweep.positions import counted
from nngeom.sweep.sweep import Chunk

AccumulateGrad = type(get_gradient_edge(torch.zeros((), requires_grad=True)).node)


class Call:
    """What is kept of one call, by the graph of its outputs: it lives and dies with that.

    Only backward passes count that add to the ``.grad`` of one of the ``parameters``; ``arrived`` is told of the first
    of them. Gradients that autograd keeps differentiable say nothing of the rows of the loss that is made of them:
    refused where rows are those of the user's ``own_loss``. ``positions``: whether those with a gradient are counted.
    """

    def __init__(
        self,
        place: int,
        outputs: Tensor,
        parameters: Iterable[Tensor],
        arrived: Callable[[Call], None],
        *,
        own_loss: bool,
        positions: bool,
    ):
        self.place, self.n = place, outputs.shape[0]
        self.several = outputs.ndim > 2 and outputs[0].numel() > max(outputs.shape[1:])
        self.parameters, self.arrived, self.own_loss, self.positions = parameters, arrived, own_loss, positions
        self.passage: Passage | None = None
        self.chunks: list[Chunk] = []  # of a metric
        self.tasks: list[int] = []  # backward passes that came by
        self.taken = False  # in averages: what comes now comes too late
        self._other = -1  # a backward pass to something else
        self._marks: Tensor | None = None  # positions with a gradient
        node, self._output = outputs.grad_fn, outputs.output_nr
        if node is None:  # a leaf
            node, self._output = get_gradient_edge(outputs)[:2]
        behind = node.next_functions
        self._near: list[Any] = [f for f, _ in behind if type(f) is AccumulateGrad]  # it holds nothing of the graph
        self._handle = node.register_prehook(self._read)

    def _read(self, grads: Any) -> None:
        gradient = grads[self._output]
        if gradient is not None and self.arrives() and self.positions:
            marks = counted(gradient.detach())
            self._marks = marks if self._marks is None else self._marks | marks

    def arrives(self) -> bool:
        """Whether the backward pass that is running counts; raises where the call was taken in, or can't be."""
        task = torch._C._current_graph_task_id()
        if task in self.tasks:
            return True
        if task == self._other:
            return False
        if self.own_loss and torch.is_grad_enabled():
            raise UnsupportedError(
                "a backward pass with create_graph=True goes through a pass that is observed: what is made of its "
                "gradients has no rows of single examples here; use fisher='monte_carlo' or 'exact' with likelihood=, "
                "whose rows are not those of the loss"
            )
        if not self._reaches_parameters():
            self._other = task
            return False
        if self.taken:
            raise ArgumentError(
                "a second backward pass goes through a forward pass that was taken in before: call backward() for all "
                "losses of a forward pass before the next forward pass and the step"
            )
        self.tasks.append(task)
        self.arrived(self)
        return True

    def _reaches_parameters(self) -> bool:
        """Whether the ``.grad`` of some parameter is added to: not by ``autograd.grad``, of which torch refuses to
        tell.
        """
        known = torch._C._will_engine_execute_node
        try:
            for node in self._near:  # found sooner than the nodes of other parameters
                if known(node) and any(node.variable is p for p in self.parameters):
                    return True
            return any(known(get_gradient_edge(p).node) for p in self.parameters if p.requires_grad)
        except RuntimeError:
            return False

    @property
    def counted(self) -> int:
        """Positions with a gradient; raises where none arrived at the outputs."""
        if self._marks is None:
            raise ArgumentError(
                "reduction='token_mean' counts the positions of the outputs that have a gradient, and none came by: "
                "expected the backward pass inside observe(), through the outputs of the model"
            )
        return int(self._marks.sum())

    def forget(self) -> None:
        """Backward passes up to now do not count."""
        self.tasks.clear()
        self._marks = None
        if self.passage is not None:
            self.passage.forget()

    def take(self) -> None:
        """It is in the averages: nothing more is kept of it."""
        self.taken = True
        self.chunks, self._near = [], []
        if self.passage is not None:
            self.passage.close()
        self.passage = None

    def close(self) -> None:
        """Take the hooks off."""
        self._handle.remove()
        self.take()
