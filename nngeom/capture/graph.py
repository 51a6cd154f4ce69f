"""The graph that autograd recorded of one forward pass: a name for what the pass did, and what follows from it.

A pass is what its operations, their constants, sizes, connections, and every edge into a parameter say. Two passes with
the same :attr:`Graph.key` did the same to other numbers. Whether all paths into a parameter are known
(:func:`unexplained`) needs no numbers at all.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from nngeom.capture.recorded import Recorded
from nngeom.core.errors import UnsupportedError

Edge = tuple[Any, int]  # a node, and which of its outputs


@dataclass(frozen=True)
class Graph:
    """The nodes behind ``outputs``, breadth first, and the leaves."""

    nodes: tuple[Any, ...]
    leaves: dict[Any, Tensor]  # nodes that accumulate the gradient of a leaf
    names: dict[Any, str]  # those of selected parameters
    hooked: frozenset[Any]  # nodes of tensors that were asked to run a function on their gradients
    key: int

    @property
    def reached(self) -> set[str]:
        """The selected parameters that some path leads to, but for those without elements."""
        return {name for node, name in self.names.items() if self.leaves[node].numel()}

    @property
    def module_hooks(self) -> bool:
        """Whether some module runs functions on the gradients of its inputs or outputs."""
        return any(node.name() == "BackwardHookFunctionBackward" for node in self.nodes)

    def consumers_first(self) -> Iterator[Any]:
        """All nodes, each after those that use its outputs."""
        waiting: dict[Any, int] = dict.fromkeys(self.nodes, 0)
        for node in self.nodes:
            for following, _ in node.next_functions:
                if following is not None:
                    waiting[following] += 1
        ready = [node for node in self.nodes[:1] if not waiting[node]]
        for node in ready:
            yield node
            for following, _ in node.next_functions:
                if following is not None:
                    waiting[following] -= 1
                    if not waiting[following]:
                        ready.append(following)


def read(outputs: Tensor, names: dict[int, str], registered: Collection[int], hooked: Collection[Any] = ()) -> Graph:
    """The graph of ``outputs``. ``names``: of selected parameters by id; ``registered``: ids of all parameters of the
    model.
    """
    order: list[Any] = [outputs.grad_fn] if outputs.grad_fn is not None else []
    place = {node: j for j, node in enumerate(order)}
    described: list[tuple[Any, ...]] = []
    leaves: dict[Any, Tensor] = {}
    found: dict[Any, str] = {}
    for node in order:
        kind = type(node)
        leaf = None if kind in _OPERATIONS else _leaf(node, kind)
        if leaf is not None:
            leaves[node] = leaf
            name = names.get(id(leaf))
            if name is not None:
                found[node] = name
            described.append((name if name is not None else id(leaf) in registered, leaf.shape))
            continue
        edges: list[Any] = []
        for following, number in node.next_functions:
            if following is None:
                edges.append(-1)
                continue
            at = place.setdefault(following, len(order))
            if at == len(order):
                order.append(following)
            edges.append((at, number))
        name, sizes = node.name(), tuple([_sizes(meta) for meta in node._input_metadata])
        held = [getattr(node, constant) for constant in _constants(kind, name, node)]
        constants = tuple([str(x) if isinstance(x, _SAYING) else None for x in held])
        described.append((kind, name, constants, sizes, tuple(edges), node in hooked))
    return Graph(tuple(order), leaves, found, frozenset(hooked), hash(tuple(described)))


def _sizes(meta: Any) -> tuple[int, ...]:
    """Of an output of a node; none of a nested tensor of rows of unlike size."""
    return () if meta.is_cpp_nested_tensor else tuple(meta.shape)


_CONSTANTS: dict[Any, tuple[str, ...]] = {}
_OPERATIONS: set[type] = set()  # kinds of nodes that were met and of which none is a leaf
_SAYING = (bool, int, str, tuple, list)  # constants that say where numbers go; not by how much they are multiplied


def _constants(kind: type, name: str, node: Any) -> tuple[str, ...]:
    """Names of the constants of a ``kind`` of operation, as ``node`` is one, not of saved tensors."""
    if (kind, name) not in _CONSTANTS:
        names = dir(node)
        _CONSTANTS[kind, name] = tuple(a for a in names if a.startswith("_saved_") and f"_raw{a}" not in names)
    return _CONSTANTS[kind, name]


def _leaf(node: Any, kind: type) -> Any:
    """The leaf whose gradient a node accumulates."""
    if not issubclass(kind, BackwardCFunction) and hasattr(kind, "variable"):
        return node.variable
    _OPERATIONS.add(kind)
    return None


def operation(node: Any) -> str | None:
    """What torch's own operation a node is the derivative of, as ``"Addmm"``; ``None`` for functions written by
    users.
    """
    if isinstance(node, BackwardCFunction):
        return None
    head, backward, _ = node.name().rpartition("Backward")
    return head if backward else None


def shape(edge: Edge) -> tuple[int, ...]:
    """The sizes of the tensor that an edge stands for."""
    return _sizes(edge[0]._input_metadata[edge[1]])


# What only says where the entries of a parameter lie, or in which dtype they are read.
_VIEWS = frozenset(
    "T Transpose View UnsafeView ReshapeAlias Permute Unsqueeze Squeeze Expand Slice Select Split "
    "SplitWithSizes UnsafeSplit "
    "UnsafeSplitWithSizes Unbind AsStrided Alias Diagonal Unfold ToCopy Clone ViewAsReal ViewAsComplex".split()
)


def unexplained(graph: Graph, uses: Sequence[Recorded]) -> set[str]:
    """Selected parameters with a path from the outputs that is in no captured use.

    Behind the output of a use lie the nodes made during its call. Every edge from a node that computes into a
    parameter, or into a view of one, must leave one of these, as many times as the use names the parameter.
    """
    owner: dict[Any, list[int]] = {}
    roots = set()
    for j, use in enumerate(uses):
        root = (use.origin or use.edge).node
        roots.add(root)
        for node in _during(root, use.since):
            owner.setdefault(node, []).append(j)
    viewed: dict[Any, str] = dict(graph.names)
    for node in reversed(list(graph.consumers_first())):
        behind = [f for f, _ in node.next_functions if f is not None]
        view = node not in roots and operation(node) in _VIEWS
        if view and len(behind) == 1 and behind[0] in viewed:
            viewed[node] = viewed[behind[0]]
    missing = _entered(graph, uses, owner)
    capture: dict[tuple[tuple[int, ...], str], int] = {}
    for node in graph.nodes:
        for following, _ in node.next_functions:
            name = viewed.get(following)
            if name is None or node in viewed:
                continue
            owners = tuple(owner.get(node, ()))
            capture[owners, name] = capture.get((owners, name), 0) + 1
    for (owners, name), count in capture.items():
        if count > max((sum(slot.name == name for slot in uses[j].use.slots) for j in owners), default=0):
            missing.add(name)
    return missing | _bypassed(graph, uses)


def _entered(graph: Graph, uses: Sequence[Recorded], owner: dict[Any, list[int]]) -> set[str]:
    """Parameters of uses that some path enters behind the output that was seen, as after a change in place of a view of
    it.
    """
    found: set[str] = set()
    for node in graph.nodes:
        for following, _ in node.next_functions:
            for j in owner.get(following, ()):
                root = (uses[j].origin or uses[j].edge).node
                if following is not root and j not in owner.get(node, ()):
                    found.update(slot.name for slot in uses[j].use.slots)
    return found


def _during(root: Any, since: int) -> Iterator[Any]:
    """The nodes made from ``since`` on that lie behind ``root``; leaves excepted."""
    waiting, capture = [root], {root}
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in capture and not hasattr(following, "variable"):
                if following._sequence_nr() >= since:
                    capture.add(following)
                    waiting.append(following)


def _bypassed(graph: Graph, uses: Sequence[Recorded]) -> set[str]:
    """Parameters of a use that was moved behind additions, whose own output goes elsewhere too."""
    copies: dict[Edge, set[Any]] = {}
    names: dict[Edge, set[str]] = {}
    for recorded in uses:
        if recorded.origin is not None:
            at = (recorded.origin.node, recorded.origin.output_nr)
            copies.setdefault(at, set()).add(recorded.edge.node)
            names.setdefault(at, set()).update(slot.name for slot in recorded.use.slots)
    if not copies:
        return set()
    consumers = [(edge, node) for node in graph.nodes for edge in node.next_functions]
    return {name for edge, node in consumers if node not in copies.get(edge, {node}) for name in names[edge]}


def require_differentiable(gradients: Iterable[Tensor | None]) -> None:
    """Raise :class:`UnsupportedError` where gradients, kept with their graph, cannot be differentiated again.

    Of functions marked ``once_differentiable`` autograd would say so only later, or take their gradient for a constant.
    """
    waiting = [g.grad_fn for g in gradients if g is not None and g.grad_fn is not None]
    capture = set(waiting)
    while waiting:
        node = waiting.pop()
        if node.name().endswith(("::Error", "::NotImplemented")):
            raise once_only(
                "a torch.autograd.Function marked once_differentiable, or an operation torch has no formula for"
            )
        following = {f for f, _ in node.next_functions if f is not None} - capture
        capture |= following
        waiting.extend(following)


def once_only(what: str) -> UnsupportedError:
    """The error of a model with an operation that can be differentiated only once."""
    return UnsupportedError(
        f"the model or the loss has an operation without second derivative ({what}); use a measure of first "
        "derivatives "
        "(GGN instead of Hessian, a kernel without differentiable=True), or another operation"
    )


def sequence_number() -> int:
    """The number that the next node of the graph will get."""
    return int(torch._C._autograd._get_sequence_nr())
