"""What was proved of one forward pass holds for every other that did the same.

Which axis holds the examples and whether the captured rows are autograd's are properties of what a pass did, not of its
numbers. What it did is the graph that autograd recorded: its operations with their constants and sizes, how they are
connected, and every edge into a parameter, also of uses that no adapter saw. A pass with the same graph needs no second
proof, in whichever call; one that took another branch of the model does.

Operations that place examples by the data itself (sorting, indexing) can do something else the next time: of those, the
axes are proved of every batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from nngeom.generator.capture import Capture
from nngeom.generator.task import Task

MOST = 1024  # graphs of one model that are remembered


@dataclass
class Proof:
    """What is known of passes with one graph."""

    axes: dict[int, Any] = field(default_factory=dict)  # example axis by place of the use
    checked: set[str] | None = None  # parameters whose captured rows were compared with autograd's, once examples were found to be separate
    wrong: set[str] = field(default_factory=set)  # those that differed
    halts: bool | None = None  # whether gradients are the same when the pass is halted at every waist of the graph
    moves: bool = False  # examples may be placed by the data: axes are known of no other batch

    def covers(self, seen: Capture) -> bool:
        """Whether examples are known to be separate and all parameters with a use left in ``seen`` were compared."""
        return self.checked is not None and self.checked.issuperset(slot.name for use in seen.uses for slot in use.slots)

    def complete(self, seen: Capture) -> None:
        """All that is known now."""
        self.checked = (self.checked or set()).union(slot.name for use in seen.uses for slot in use.slots)


_PROOFS: WeakKeyDictionary[nn.Module, dict[int, Proof]] = WeakKeyDictionary()


def proof_of(task: Task, seen: Capture) -> Proof:
    """What is known of a pass, to be completed by who finds out more."""
    nodes, moves = _graph(seen.outputs, {id(p): name for name, p in task.parameters.items()})
    uses = tuple((use.operation, use.lead, use.slots, use.lookup) for use in seen.uses)
    key = hash((tuple(nodes), uses, frozenset(seen.unstructured), seen.hooks, seen.outputs.shape, seen.outputs.dtype, seen.outputs.device))
    known = _PROOFS.setdefault(task.model, {})
    if key not in known and len(known) >= MOST:
        known.clear()
    proof = known.setdefault(key, Proof(moves=moves))
    if moves:
        proof.axes.clear()
    return proof


def forget(model: nn.Module) -> None:
    """As if nothing had been proved of the model."""
    _PROOFS.pop(model, None)


_MOVERS = ("Index", "Gather", "Scatter", "Sort", "Topk", "Take", "Put", "MaskedS", "PackPadded")


def _graph(outputs: Tensor, names: Mapping[int, str]) -> tuple[list[tuple], bool]:
    """The nodes behind ``outputs`` in a fixed order, ``(operation, constants, edges)``, and whether any places examples by data."""
    order = [outputs.grad_fn] if outputs.grad_fn is not None else []
    place = {node: j for j, node in enumerate(order)}
    nodes: list[tuple] = []
    moves = False
    for node in order:
        edges = []
        for following, number in node.next_functions:
            if following is None:
                edges.append((-1, number))
                continue
            if following not in place:
                place[following] = len(order)
                order.append(following)
            edges.append((place[following], number))
        kind, name = type(node), node.name()
        if hasattr(node, "variable"):
            nodes.append((names.get(id(node.variable)), tuple(node.variable.shape)))
            continue
        moves |= name.startswith(_MOVERS) and not hasattr(node.next_functions[0][0], "variable")
        nodes.append((kind, name, tuple(map(_constant, (getattr(node, c) for c in _constants(node)))), tuple(edges)))
    return nodes, moves


_CONSTANTS: dict[Any, tuple[str, ...]] = {}


def _constants(node: Any) -> tuple[str, ...]:
    """Names of the constants of a kind of operation, not of saved tensors."""
    kind = type(node), node.name()
    if kind not in _CONSTANTS:
        names = dir(node)
        _CONSTANTS[kind] = tuple(a for a in names if a.startswith("_saved_") and f"_raw{a}" not in names)
    return _CONSTANTS[kind]


def _constant(x: Any) -> Any:
    """A hashable constant that says where numbers go; not by how much they are multiplied."""
    return str(x) if isinstance(x, (bool, int, str, tuple, list)) else None
