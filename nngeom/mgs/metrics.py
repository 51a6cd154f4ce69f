"""Model Gradient Similarity along training: trace and log-determinant of each batch's kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nngeom.analysis.kernel import require_symmetric, square_kernel
from nngeom.analysis.rows import wide_kernels
from nngeom.analysis.spectrum import effective_rank
from nngeom.core import linalg
from nngeom.core.given_plainly import require_at_least
from nngeom.cotangents.loss import EveryOutput
from nngeom.fmat.side import Side
from nngeom.space.collection import LayerCollection
from nngeom.sweep.agreement import agree
from nngeom.sweep.run import Function, Run
from nngeom.sweep.sweep import require_examples


@dataclass(frozen=True)
class Metrics:
    """One entry a batch, for its ``(n c, n c)`` kernel of raw outputs (never divided by ``n``).

    ``trace``; ``logdet`` (``-inf`` where the kernel is singular to rounding, see ``rank``); ``logdet_jittered``, of
    ``K + jitter I``; ``eigenvalues``, descending, a tensor a batch; ``size = n c``; ``mean_trace = trace / size`` and
    ``mean_log = logdet_jittered / size``, comparable between batch sizes; ``effective_rank``; ``cosine``, the mean
    cosine of different rows (NaN where there is one): a small trace says "small gradients", a large cosine and a low
    effective rank say "similar" ones. All in float64.
    """

    trace: Tensor
    logdet: Tensor
    eigenvalues: tuple[Tensor, ...]
    rank: Tensor
    logdet_jittered: Tensor
    size: Tensor
    effective_rank: Tensor
    cosine: Tensor
    jitter: float

    @property
    def mean_trace(self) -> Tensor:
        """``trace / size``."""
        return self.trace / self.size

    @property
    def mean_log(self) -> Tensor:
        """``logdet_jittered / size``: the logarithm of the geometric mean eigenvalue."""
        return self.logdet_jittered / self.size


def metrics(
    model: nn.Module,
    loader: Any,
    jitter: float = 1e-6,
    *,
    function: Function = None,
    layer_collection: LayerCollection | None = None,
    memory_budget: int | None = None,
    process_group: Any = None,
) -> Metrics:
    """The metrics of Model Gradient Similarity, one entry a batch of ``loader``; smaller is more similar.

    ``jitter``: what is added to the eigenvalues in ``logdet_jittered``. A singular kernel is no error: its ``logdet``
    is ``-inf``. Products are taken in float64, so that a float32 model has eigenvalues down to ``(N eps)^2`` of the
    largest. Raises :class:`LoaderError` on an empty loader. Source: Szolnoky et al. 2022, section on metrics; what they
    call the determinant is its logarithm. With a ``process_group`` the batches of all processes, in rank order.
    """
    require_at_least(jitter, "jitter", above=True)
    run = Run.of(
        model,
        loader,
        function=function,
        layer_collection=layer_collection,
        memory_budget=memory_budget,
        process_group=process_group,
    )
    agree(run, "metrics", jitter=jitter)
    with run.within(), run.team.together("metrics") as note, torch.no_grad():
        sides = (Side.of(run.on([batch]), EveryOutput()) for batch in run.batches())
        entries = [_entry(square_kernel(wide_kernels(side)[""]), jitter, side.kept) for side in sides]
        note.mine = entries if run.team.size == 1 else [{name: t.cpu() for name, t in e.items()} for e in entries]
    entries = [{name: t.to(run.network.device) for name, t in e.items()} for mine in note.all for e in mine]
    require_examples(len(entries))
    columns = {name: torch.stack([e[name] for e in entries]) for name in entries[0] if name != "eigenvalues"}
    return Metrics(eigenvalues=tuple(e["eigenvalues"] for e in entries), jitter=jitter, **columns)


def kernel_metrics(K: Any, jitter: float = 1e-6, rows: torch.dtype | None = None) -> Metrics:
    """:func:`metrics` of one kernel ``K`` at hand, ``(N, N)``, ``(c, n, c, n)`` or an FMat, with ``jitter`` as there.

    ``rows``: the dtype of the rows it is a product of, where narrower.
    """
    require_at_least(jitter, "jitter", above=True)
    k = require_symmetric(K)
    entry = _entry(k, jitter, rows or k.dtype)
    columns = {name: t.unsqueeze(0) for name, t in entry.items() if name != "eigenvalues"}
    return Metrics(eigenvalues=(entry["eigenvalues"],), jitter=jitter, **columns)


def _entry(k: Tensor, jitter: float, rows: torch.dtype) -> dict[str, Tensor]:
    values = linalg.eigh((k + k.T) / 2)[0].flip(0)
    size = len(values)
    floor = max(size * torch.finfo(values.dtype).eps, (size * torch.finfo(rows).eps) ** 2)
    live = values > floor * values[0].clamp_min(0)
    rank = live.sum()
    positive = torch.where(live, values, torch.zeros_like(values))
    norm = k.diagonal().clamp_min(0).sqrt()
    unit = torch.where(norm > 0, 1 / torch.where(norm > 0, norm, torch.ones_like(norm)), torch.zeros_like(norm))
    cosines = unit[:, None] * k * unit[None, :]
    pairs = size * (size - 1)
    return {
        "trace": k.trace(),
        "logdet": positive.log().sum(),
        "eigenvalues": positive,
        "rank": rank,
        "logdet_jittered": (positive + jitter).log().sum(),
        "size": torch.tensor(size, device=k.device),
        "effective_rank": effective_rank(positive),
        "cosine": (cosines.sum() - cosines.diagonal().sum()) / pairs if pairs else k.new_tensor(float("nan")),
    }
