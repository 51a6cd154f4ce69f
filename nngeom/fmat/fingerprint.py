"""What the numbers of a kernel depend on, by name: so that a file is known again, or said to be of other inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nngeom.core.contents import digest
from nngeom.cotangents.loss import EveryOutput
from nngeom.fmat.side import Side
from nngeom.pmat.pmat import PMat

NUMBERS = 4096  # of the first outputs that are kept


@dataclass(frozen=True)
class Fingerprint:
    """Hashes of the inputs by name, and the first outputs, which see what has none: attributes, functions, modes.

    Outputs are compared to rounding, which differs between machines: ``eps**(2/3)`` of the largest.
    """

    hashes: dict[str, str]
    outputs: list[float]
    largest: float
    eps: float

    @staticmethod
    def of(rows: Side, columns: Side | None, *, centered: bool, metric: PMat | None = None) -> Fingerprint:
        """Of a kernel between ``rows`` and ``columns`` in a ``metric``; runs the model on the first batch."""
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
        outputs = rows.first_outputs()
        hashes["dtype and shape of the outputs"] = f"{outputs.dtype} {tuple(outputs.shape)}"
        gradients = [g for side in (rows, columns) if side is not None and side.sizes for g in _loss_gradients(side)]
        if gradients:
            hashes["rows"] = "of a loss"
        seen = torch.cat([outputs.flatten(), *gradients])
        return Fingerprint(hashes, _sketch(seen), max(_sketch(seen.abs()), default=0.0), torch.finfo(seen.dtype).eps)

    @staticmethod
    def over(parts: Sequence[Fingerprint], **split: Any) -> Fingerprint:
        """That of a kernel whose examples are split over processes, from the ``parts`` of these; ``split``: how."""
        hashes = {name: str(value) for name, value in split.items()}
        for rank, part in enumerate(parts):
            for name, x in part.hashes.items():
                of_all = not name.startswith("batch") and all(other.hashes.get(name, x) == x for other in parts)
                hashes[name if of_all else f"{name} of rank {rank}"] = x
        outputs = [x for part in parts for x in part.outputs]
        return Fingerprint(hashes, outputs, max(p.largest for p in parts), max(p.eps for p in parts))

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
        return odd


def _loss_gradients(side: Side) -> list[Tensor]:
    """Those of the first batch in its outputs, where rows are not of these themselves."""
    cotangents = side.sweep.cotangents
    if isinstance(cotangents, EveryOutput):
        return []
    return [cotangents.columns(side.first_outputs(), side.run.loader[0], 0).make(0, 1).flatten()]


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
