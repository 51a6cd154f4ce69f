"""Where the examples lie, read off the graph: whatever the numbers, for every operation that is known to keep examples
apart.

The outputs have them on their first axis. From there back, each operation whose meaning says so tells on which axis of
its inputs they lie: the same one where it acts entry by entry, the place that sizes give in another view, the batch
axis of a product. A tensor that all examples share (one side of a product, a table added to all) has none. Where an
operation contracts, sorts, indexes or normalises along the axis of the examples, or is not on the list (:mod:`.safe`),
the graph does not tell (:data:`ASK`): there numbers are asked, in every batch.
"""

from __future__ import annotations

from nngeom.capture.graph import Edge, Graph, operation, shape
from nngeom.pullback.axes import ExampleAxis
from nngeom.pullback.safe import ASK, RULES, Place, entrywise

__all__ = ["ASK", "Place", "places"]


def places(graph: Graph, n: int, *, trained: bool = False) -> dict[Edge, Place]:
    """Where the ``n`` examples lie in every tensor of the graph, an edge each.

    ``trained``: batch normalisation that uses the statistics of the batch counts as if it kept examples apart.
    """
    root = graph.nodes[0]
    known: dict[Edge, Place] = {}
    for number, meta in enumerate(root._input_metadata):
        known[root, number] = ExampleAxis(0) if len(meta.shape) and meta.shape[0] == n else ASK
    for node in graph.consumers_first():
        outputs = [(j, known[node, j]) for j in range(len(node._input_metadata)) if (node, j) in known]
        if node in graph.hooked:
            outputs = [(j, ASK) for j, _ in outputs]
            known.update(((node, j), ASK) for j, _ in outputs)
        for number, edge in enumerate(node.next_functions):
            if edge[0] is None:
                continue
            candidates = [_behind((node, j), number, place, n, trained=trained) for j, place in outputs]
            candidates += [known[edge]] if edge in known else []
            agree = candidates and all(place == candidates[0] for place in candidates)
            known[edge] = candidates[0] if agree else ASK
    return known


def _behind(output: Edge, number: int, place: Place, n: int, *, trained: bool) -> Place:
    """Where the examples lie in an input of a node, from where they lie in an output."""
    if not isinstance(place, ExampleAxis):
        return place
    node = output[0]
    out, sizes, name = shape(output), shape(node.next_functions[number]), operation(node)
    rule = RULES.get(name) if name is not None else None
    if name == "NativeBatchNorm" and trained and number == 0:
        rule = entrywise
    behind = ASK if rule is None else rule(node, number, place, out, sizes, n)
    fits = not isinstance(behind, ExampleAxis) or behind.dim is None or sizes[behind.dim] % (behind.outer * n) == 0
    return behind if fits else ASK
