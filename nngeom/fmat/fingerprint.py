"""What the numbers of a kernel depend on, by name: so that a file is known again, or said to be of other inputs.

Parameters, buffers and batches have hashes. What has none (attributes, functions, modes, hooks) shows in the outputs of
all batches and in a gradient on the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from nngeom.core.contents import digest
from nngeom.core.outline import Sketch, alike, outline
from nngeom.cotangents.loss import EveryOutput
from nngeom.fmat.side import Side
from nngeom.pmat.pmat import PMat

NUMBERS = 4096  # of the first outputs that are kept


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of the inputs by name; the first outputs; outlines of later ones, and of a gradient of the first.

    They are compared to rounding, which differs between machines: ``eps**(2/3)`` of the largest.
    """

    hashes: dict[str, str]
    outputs: list[float]
    largest: float
    eps: float
    later: list[Sketch] = field(default_factory=list)
    gradients: list[Sketch] = field(default_factory=list)

    @staticmethod
    def of(rows: Side, columns: Side | None, *, centered: bool, metric: PMat | None = None) -> Fingerprint:
        """Of a kernel of ``rows`` and ``columns`` in a ``metric``: runs the model on all batches, back on the first."""
        network = rows.run.network
        hashes = {
            "centered": repr(centered),
            "layer_collection": digest((network.collection.names, network.collection.shapes)),
        }
        named = [
            *network.model.named_parameters(remove_duplicate=False),
            *network.model.named_buffers(remove_duplicate=False),
        ]
        hashes |= {f"{kind} {name!r}": digest(x) for kind, name, x in ((_kind(x), name, x) for name, x in named)}
        for what, side in (("batch", rows), ("batch of other=", columns)):
            hashes |= {
                f"{what} {j}": digest(batch) for j, batch in enumerate(side.run.loader if side is not None else ())
            }
        if metric is not None:
            hashes["metric"] = digest(
                [(repr(layout), type(b).__name__, *b.tensors()) for layout, b in metric.blocks.items()]
            )
        if not rows.sizes:  # those of another process
            return Fingerprint(hashes, [], 0.0, torch.finfo(rows.dtype).eps)
        outputs, pulled = rows.first_outputs()
        hashes["dtype and shape of the outputs"] = f"{outputs.dtype} {tuple(outputs.shape)}"
        gradients = [g for side in (rows, columns) if side is not None and side.sizes for g in _loss_gradients(side)]
        if gradients:
            hashes["rows"] = "of a loss"
        seen = torch.cat([outputs.flatten(), *gradients])
        later = [outline(x) for j, side in enumerate((rows, columns)) if side is not None for x in _others(side, 1 - j)]
        largest, eps = max(_sketch(seen.abs()), default=0.0), torch.finfo(seen.dtype).eps
        return Fingerprint(hashes, _sketch(seen), largest, eps, later, [outline(g) for g in pulled])

    @staticmethod
    def over(parts: Sequence[Fingerprint], **split: Any) -> Fingerprint:
        """That of a kernel whose examples are split over processes, from the ``parts`` of these; ``split``: how."""
        hashes = {name: str(value) for name, value in split.items()}
        for rank, part in enumerate(parts):
            for name, x in part.hashes.items():
                of_all = not name.startswith("batch") and all(other.hashes.get(name, x) == x for other in parts)
                hashes[name if of_all else f"{name} of rank {rank}"] = x
        outputs, later, pulled = (
            [x for part in parts for x in each(part)]
            for each in (attrgetter("outputs"), attrgetter("later"), attrgetter("gradients"))
        )
        return Fingerprint(hashes, outputs, max(p.largest for p in parts), max(p.eps for p in parts), later, pulled)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def differs(self, plain: dict[str, Any]) -> list[str]:
        """What is not as in another one, given as :meth:`plain`."""
        other = plain["hashes"]
        lacking = {name: None for name in other if name not in self.hashes}
        odd = [name for name in {**lacking, **self.hashes} if self.hashes.get(name) != other.get(name)]
        tolerance = self.eps ** (2 / 3) * self.largest
        theirs = plain["outputs"]
        if len(theirs) != len(self.outputs) or not all(abs(a - b) <= tolerance for a, b in zip(self.outputs, theirs)):
            odd.append(
                "outputs of the first batch (where nothing else differs: an attribute, the function, the loss, or a "
                "mode)"
            )
        if not _alike(plain.get("later", []), self.later, self.eps):
            odd.append("outputs of later batches")
        if not _alike(plain.get("gradients", []), self.gradients, self.eps):
            odd.append("gradients of the first batch (where nothing else differs: a hook, a detached part)")
        return odd


def _alike(then: Sequence[Sequence[float]], now: Sequence[Sketch], eps: float) -> bool:
    size = max((x[2] for x in now), default=0.0)
    return len(then) == len(now) and all(alike((a, b, c), x, eps, size) for (a, b, c), x in zip(then, now))


def _others(side: Side, first: int) -> Iterator[Tensor]:
    """The outputs of batches from ``first`` on, and where rows are those of a loss its gradients."""
    cotangents = side.sweep.cotangents
    for batch in side.run.loader[first:]:
        with torch.no_grad(), side.within():
            outputs = side.run.network.run(batch)
        yield outputs
        if not isinstance(cotangents, EveryOutput):
            yield cotangents.columns(outputs, batch, 0).make(0, 1)


def _loss_gradients(side: Side) -> list[Tensor]:
    """Those of the first batch in its outputs, where rows are not of these themselves."""
    cotangents = side.sweep.cotangents
    if isinstance(cotangents, EveryOutput):
        return []
    return [cotangents.columns(side.first_outputs()[0], side.run.loader[0], 0).make(0, 1).flatten()]


def _kind(x: Tensor) -> str:
    return "parameter" if isinstance(x, torch.nn.Parameter) else "buffer"


def _sketch(outputs: Tensor) -> list[float]:
    """The outputs; of more than a few thousand, sums of neighbours, so weighted that nothing cancels by design."""
    flat = outputs.flatten().to(torch.promote_types(outputs.dtype, torch.float32))
    width = max(1, math.ceil(flat.numel() / NUMBERS))
    weights = (torch.arange(width, dtype=torch.float64) * 0.6180339887498949).frac().add(0.5).to(flat)
    whole = flat[: flat.numel() // width * width].view(-1, width)
    rest = flat[whole.numel() :]
    sums = [whole @ weights, (rest @ weights[: len(rest)]).view(1)] if len(rest) else [whole @ weights]
    return torch.cat(sums).tolist()
