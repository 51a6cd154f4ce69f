"""Right, or it says why not: what must be known of every batch that enters a result, and how it is known.

*Complete*: every path from the outputs into a selected parameter is in a captured use, or its parameter is left to the
fallback. The graph tells (:func:`~nngeom.capture.graph.unexplained`), as it tells a parameter that something else
stands in for.

*Placed*: row ``[k, n]`` depends on example ``n`` alone, and is that of example ``n``. The graph tells where all
operations between the outputs and a use are on the list of those that keep examples apart whatever the numbers
(:mod:`~nngeom.pullback.safe`). Elsewhere numbers are asked, in every batch (:func:`~nngeom.pullback.axes.find_axes`).
What no gradient shows, examples mixed by constants, is asked of outputs: those of parts of the batch must be those of
the whole.

*Right*: the rows are autograd's. Gradients at the uses are autograd's own; what an adapter makes of them is compared
with autograd's gradient of the parameter, with random gradients put in at every use, so that no zero on the way hides
one.

What a pass did is its graph. What the graph tells, and what was compared on it, holds for every pass with the same
graph, in whichever call; a comparison in which the expected gradient is zero was none, and is made again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from weakref import WeakKeyDictionary

from torch import nn

from nngeom.capture.graph import Graph, unexplained
from nngeom.capture.known_factors import Factors
from nngeom.capture.network import Network
from nngeom.capture.recorded import Recorded
from nngeom.capture.recorder import Capture
from nngeom.core.errors import CoverageError, UnsupportedError
from nngeom.pullback.axes import ExampleAxis, Where, read_axis
from nngeom.pullback.known_groups import KnownGroups
from nngeom.pullback.placement import ASK, Place, places

MOST = 1024  # graphs of one model that are remembered


@dataclass
class Proof:
    """What is known of passes with one graph."""

    places: dict[int, Place] = field(default_factory=dict)  # of the examples, by place of the use, where they are known
    reached: frozenset[str] = frozenset()  # parameters that some path leads to
    apart: bool = True  # every tensor on the way has its examples on an axis of their own
    left: set[str] = field(
        default_factory=set
    )  # parameters left to the fallback: some path is unknown, or rows differed
    compared: set[str] = field(default_factory=set)  # parameters whose rows were compared with autograd's
    separate: dict[int, Factors] = field(
        default_factory=dict
    )  # programs in which parts of the batch gave the outputs of the whole, and what they were multiplied by
    head: bool | None = None  # whether gradients arrive at the inputs of the last use as products with its weight
    groups: KnownGroups | None = None  # blocks of which no use is asked, left to the fallback or divided
    scattered: frozenset[str] | None = None  # of one example: parameters whose examples the graph of two does not place
    halts: bool | None = None  # whether gradients are the same when the pass is halted at every halt of the graph

    def place(self, j: int) -> Place:
        """Where the examples of a use lie."""
        return self.places.get(j, ASK)

    def unplaced(self, uses: Sequence[Recorded]) -> frozenset[str]:
        """Parameters with ``uses`` whose examples the graph does not place."""
        open_ = (recorded.use for recorded in uses if self.place(recorded.place) is ASK)
        return frozenset(slot.name for use in open_ for slot in use.slots)

    def marked(self, axes: Sequence[Where | None], uses: Sequence[Recorded]) -> list[Where | None]:
        """The ``axes`` of the ``uses`` of one example, as those of several would be."""
        known = self.scattered or frozenset()
        of = [any(slot.name in known for slot in recorded.use.slots) for recorded in uses]
        return [replace(x, asked=True) if asked and isinstance(x, ExampleAxis) else x for asked, x in zip(of, axes)]

    def is_separate(self, as_what: int) -> bool:
        """Whether examples were seen to be separate in the program ``as_what``, under the factors that there are."""
        known = self.separate.get(as_what)
        return known is not None and known.hold()

    def has_compared(self, capture: Capture) -> bool:
        """Whether the rows of all parameters of a pass were compared with autograd's."""
        return self.compared.issuperset([slot.name for recorded in capture.uses for slot in recorded.use.slots])


_PROOFS: WeakKeyDictionary[nn.Module, dict[int, Proof]] = WeakKeyDictionary()


def proof_of(network: Network, capture: Capture) -> Proof:
    """What is known of a pass, to be completed by who finds out more; raises where the graph shows that it can't be
    right.
    """
    graph = capture.graph()
    each = (recorded.use for recorded in capture.uses)
    uses = tuple((use.operation, use.lead, use.slots, use.lookup) for use in each)
    outputs = capture.outputs
    key = hash(
        (
            graph.key,
            uses,
            frozenset(capture.unstructured),
            capture.training,
            outputs.shape,
            outputs.dtype,
            outputs.device,
        )
    )
    known = _PROOFS.setdefault(network.model, {})
    if key not in known:
        if len(known) >= MOST:
            known.clear()
        known[key] = _concluded(network, capture, graph)
    return known[key]


def keeps_apart(network: Network, capture: Capture) -> bool:
    """Whether the graph tells that no example has a part in the rows of another."""
    proof = proof_of(network, capture)
    placed = all(isinstance(proof.place(use.place), ExampleAxis) for use in capture.uses)
    return placed and not (proof.left | capture.unstructured | network.hooked)


def forget(model: nn.Module) -> None:
    """As if nothing had been proved of the model."""
    _PROOFS.pop(model, None)


def _concluded(network: Network, capture: Capture, graph: Graph) -> Proof:
    """What the graph tells."""
    _require_one_each(graph)
    if not capture.training:
        _require_reached(network, capture, graph)
    if any(node.name() == "CheckpointFunctionBackward" for node in graph.nodes):
        raise UnsupportedError(
            "the model uses torch.utils.checkpoint with use_reentrant=True, whose parameters no gradient can be "
            "asked of; "
            "expected use_reentrant=False"
        )
    n = capture.outputs.shape[0]
    known: dict[int, Place] = {}
    apart = True
    if n == 1:
        known = {use.place: ExampleAxis(None) for use in capture.uses}
    elif graph.nodes:
        placed = places(graph, n, trained=capture.training)
        apart = all(isinstance(place, ExampleAxis) for edge, place in placed.items() if edge[0] not in graph.leaves)
        for use in capture.uses:
            edge = use.edge.node, use.edge.output_nr
            place = placed.get(edge, ASK)
            if isinstance(place, ExampleAxis):
                place = read_axis(use, place, n, capture.outputs.device) or ASK
            known[use.place] = place
    return Proof(known, frozenset(graph.reached), apart, unexplained(graph, capture.uses))


def _require_one_each(graph: Graph) -> None:
    """Raise where several tensors stand for one parameter."""
    times = Counter(graph.names.values())
    several = sorted(name for name in times if times[name] > 1)
    if several:
        raise CoverageError(
            f"the model exchanges the parameters {several[:4]} in the middle of a forward pass: several tensors "
            "stand for each; expected one in each pass"
        )


def _require_reached(network: Network, capture: Capture, graph: Graph) -> None:
    """Raise where other tensors stand in for selected parameters."""
    missing = {name: tuple(p.shape) for name, p in network.parameters.items() if name not in graph.reached}
    registered = capture.leaves.registered
    strangers = [leaf for leaf in graph.leaves.values() if id(leaf) not in registered]
    stand_ins = {name for name, shape in missing.items() for leaf in strangers if tuple(leaf.shape) == shape}
    if stand_ins or (len(missing) == len(network.parameters)):
        names = sorted(stand_ins or missing)
        raise CoverageError(
            f"the outputs do not depend on the selected parameters {names[:4]}{'...' if len(names) > 4 else ''} "
            "of the model"
            + (", but on other tensors of their shapes that are no parameters of it" if stand_ins else "")
            + ": expected outputs computed by this very model (no deepcopy, no functional_call with copies, no "
            "sharding "
            "that exchanges parameters), or a layer_collection of parameters that the outputs depend on"
        )
