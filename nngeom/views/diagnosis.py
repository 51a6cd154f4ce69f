"""What is known of a model on one batch, and how: from the graph, from numbers, or not at all; and what its outputs
depend on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nngeom.capture.batch import one_batch
from nngeom.capture.graph import unexplained
from nngeom.capture.network import Batch, Network, gradients_on, require_finite, take
from nngeom.capture.recorder import Capture, record
from nngeom.core.errors import ArgumentError, NNGeomError
from nngeom.pullback.axes import ExampleAxis
from nngeom.pullback.captured_pass import Pass
from nngeom.space.collection import LayerCollection
from nngeom.views.shown import Frame, Shown, pandas


@dataclass(frozen=True)
class Finding:
    """One parameter, by ``name``: how it is known that its rows are ``complete``, ``placed`` and ``right``.

    ``operations``: every use that was seen, in order; ``rows``: ``"captured"``, ``"fallback"`` or ``"unused"``.
    """

    name: str
    operations: tuple[str, ...]  # every use that was seen, in order
    rows: str  # "captured", "fallback" or "unused"
    complete: str
    placed: str
    right: str


@dataclass(frozen=True)
class Effect:
    """How much the outputs ``change``, relative to the largest, when something changes that they should not depend on.

    ``name``: what was changed; ``change`` is ``None`` where that could not be tried, for the reason in ``note``.
    """

    name: str
    change: float | None  # None: could not be tried
    note: str = ""


@dataclass(frozen=True, repr=False)
class Diagnosis(Shown):
    """Two tables, ``findings`` and ``effects``; print them. ``diagnosis[name]`` is the :class:`Finding` of a parameter,
    or the :class:`Effect` of that name. ``refused``: why measures refuse the model on this batch; ``""`` where they
    take it.
    """

    findings: tuple[Finding, ...]
    effects: tuple[Effect, ...]
    refused: str = ""

    def frames(self) -> Iterator[Frame]:
        """Two tables: of the parameters, and of what the outputs depend on."""
        head = ["parameter", "used in", "rows", "complete", "placed", "right"]
        body = [[f.name, ", ".join(f.operations) or "-", f.rows, f.complete, f.placed, f.right] for f in self.findings]
        told = [[e.name, "-" if e.change is None else f"{e.change:.1e}", e.note] for e in self.effects]
        told += [["refused by measures", "-", self.refused]] if self.refused else []
        yield Frame(head, body)
        yield Frame(["outputs against", "change", ""], told)

    def to_pandas(self, table: str = "findings") -> Any:
        """A ``table``, ``"findings"`` or ``"effects"``, as a ``pandas.DataFrame``; raises :class:`ArgumentError` for
        another, :class:`MissingExtraError` without pandas.
        """
        tables = {"findings": self.findings, "effects": self.effects}
        if table not in tables:
            raise ArgumentError(f"table is {table!r}; expected 'findings' or 'effects'")
        return pandas().DataFrame([vars(row) for row in tables[table]]).set_index("name")

    def __getitem__(self, name: str) -> Any:
        return {**{e.name: e for e in self.effects}, **{f.name: f for f in self.findings}}[name]


def diagnose(
    model: nn.Module,
    batch: Any,
    *,
    function: Callable[..., Tensor] | None = None,
    layer_collection: LayerCollection | None = None,
) -> Diagnosis:
    """What was proved of ``model`` on one ``batch`` (as a loader would give it) and how; what its outputs depend on.

    ``function`` and ``layer_collection`` as for :func:`FIM`. Of every parameter: whether its rows are *complete*,
    *placed* and *right* by the graph alone, by numbers, or by numbers in every batch (see "The check" in the page on
    concepts), or come from the per-example fallback, and why. Of the outputs: how much they change with the number of
    examples in the batch, their order, a repeated call, padding (batches with an ``attention_mask``), and the dtype.
    ``refused`` says what a measure of rows raises on this batch.

    Raises what :func:`FIM` raises for models that are random or keep a state, :class:`OutputError` and
    :class:`ArgumentTypeError`; a model that mixes examples, or has outputs that are not finite, is reported.
    """
    network = Network.build(model, function, layer_collection)
    moved = next(iter(network.batches(one_batch(batch))))
    capture = record(network, moved)
    operations: dict[str, list[str]] = {}
    for use in (recorded.use for recorded in capture.uses):
        for slot in use.slots:
            operations.setdefault(slot.name, []).append(use.operation)
    unknown = unexplained(capture.graph(), capture.uses)
    run = Pass(network, capture, set())
    run.resolve(check=True)
    run.prove(separate=False)
    told = lambda name: _finding(name, tuple(operations.get(name, ())), run, unknown)
    findings = tuple(told(name) for name in network.collection.names)
    return Diagnosis(findings, tuple(_effects(network, capture)), _refusal(run))


def _refusal(run: Pass) -> str:
    """What a measure says instead of giving rows."""
    outputs = run.capture.values
    try:
        require_finite(outputs, "outputs", 0)
        run.require_separate()
        run.pull(torch.ones_like(outputs).unsqueeze(0))
    except NNGeomError as error:
        return str(error)
    return ""


def _finding(name: str, operations: tuple[str, ...], run: Pass, unknown: set[str]) -> Finding:
    captured = {n for group in run.groups for n in group.layout.names}
    if name in captured:
        uses = [r for r in run.capture.uses if any(slot.name == name for slot in r.use.slots)]
        by_graph = all(isinstance(run.proof.place(use.place), ExampleAxis) for use in uses)
        right = "compared" if name in run.proof.compared else "not compared: its gradient is zero here, or rounding"
        return Finding(name, operations, "captured", "graph", "graph" if by_graph else "numbers, every batch", right)
    if name not in run.rest:
        return Finding(name, operations, "unused", "graph", "-", "-")
    if name in run.network.hooked:
        why = "it runs a function on its gradient"
    elif name in run.capture.unstructured:
        why = "an operation without adapter uses it"
    elif name in unknown:
        why = "a path to it is in no known operation"
    elif name in run.proof.left:
        why = "rows of the adapter were not autograd's"
    else:
        why = "examples share a use of it, or are mixed there"
    return Finding(name, operations, "fallback", why, "one example at a time", "autograd's own")


def _effects(network: Network, capture: Capture) -> list[Effect]:
    outputs, batch, n = capture.outputs.detach(), capture.batch, capture.outputs.shape[0]
    few = sorted({round(j * (n - 1) / 7) for j in range(8)}) if n > 1 else []
    alone = lambda: torch.cat([_run(network, take(batch, [j], n)) for j in few])
    backwards = list(range(n - 1, -1, -1))
    return [
        _effect("number of examples", alone, outputs[few], outputs)
        if few
        else Effect("number of examples", None, "one example"),
        _effect("order", lambda: _run(network, take(batch, backwards, n)), outputs.flip(0), outputs),
        _effect("repetition", lambda: _run(network, batch), outputs, outputs),
        _padding(network, batch, outputs),
        _dtype(network, batch, outputs),
    ]


def _run(network: Network, batch: Batch) -> Tensor:
    with gradients_on():
        return network.run(batch).detach()


def _effect(name: str, run: Callable[[], Tensor], expected: Tensor, whole: Tensor) -> Effect:
    try:
        got = run()
    except NNGeomError as error:
        return Effect(name, None, str(error))
    except Exception as error:
        return Effect(name, None, f"does not run: {error}".splitlines()[0])
    if got.shape != expected.shape:
        return Effect(name, None, f"outputs have shape {tuple(got.shape)} instead of {tuple(expected.shape)}")
    scale = float(whole.double().abs().max()) or 1.0
    return Effect(name, float((got.double() - expected.double()).abs().max()) / scale)


def _padding(network: Network, batch: Batch, outputs: Tensor) -> Effect:
    """One more position, masked."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return Effect("padding", None, "the batch has no attention_mask (n, t)")
    t = mask.shape[1]
    longer = {k: F.pad(v, (0, 1)) if isinstance(v, Tensor) and v.shape == mask.shape else v for k, v in batch.items()}

    def run() -> Tensor:
        out = _run(network, longer)
        return out[:, :t] if out.ndim > 2 and out.shape[1] == t + 1 else out

    return _effect("padding", run, outputs, outputs)


def _dtype(network: Network, batch: Batch, outputs: Tensor) -> Effect:
    """Beside a copy of the model in float64 (of a float64 model, in float32)."""
    if network.function is not None:
        return Effect("dtype", None, "function= runs the model as it is")
    other = torch.float32 if network.dtype == torch.float64 else torch.float64

    def run() -> Tensor:
        model = copy.deepcopy(network.model).to(other)
        return _run(Network.build(model, None, None), _cast(batch, other))

    return _effect("dtype", run, outputs, outputs)


def _cast(batch: Batch, dtype: torch.dtype) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {k: _cast(v, dtype) for k, v in batch.items()}
    return tuple(_cast(v, dtype) for v in batch) if isinstance(batch, (tuple, list)) else batch
