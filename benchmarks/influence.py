"""``python -m benchmarks.influence``: scores of a training set for 8 and 200 queries, beside a hand-written version.

The hand-written one is given the eigenbasis and the damped spectrum of the same EKFAC matrix. Hooks keep the inputs of
every layer and a backward pass to the layers' outputs their gradients; queries are multiplied once; then one ``einsum``
a layer, over inputs first or over rows first, whichever is faster. Both give the scores and those of every example for
itself, and are timed only after they agree to 1e-4.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng
from benchmarks.timing import interleaved
from benchmarks.workloads import workload

DAMPING = 1e-3
Captured = list[tuple[Tensor, Tensor]]  # inputs (n, t, i) with the ones of a bias, gradients (n, t, o) of every layer


class ByHand:
    """EKFAC influence of linear layers and convolutions, as one writes it down."""

    def __init__(self, model: nn.Module, matrix: nng.PMatEKFAC, by_rows: bool):
        self.model, self.by_rows = model, by_rows
        self.layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
        self.blocks = [(b.ua[0], b.ug[0], 1 / (b.d[0] + DAMPING)) for b in matrix.blocks.values()]

    def captured(self, x: Tensor, y: Tensor) -> Captured:
        """One forward and one backward pass."""
        seen: list[tuple[Tensor, Tensor]] = []
        hooks = [m.register_forward_hook(lambda m, a, out: seen.append((a[0], out))) for m in self.layers]
        loss = F.cross_entropy(self.model(x), y, reduction="sum")
        gradients = torch.autograd.grad(loss, [out for _, out in seen])
        for hook in hooks:
            hook.remove()
        return [self._of(m, a.detach(), g) for m, (a, _), g in zip(self.layers, seen, gradients)]

    def _of(self, m: nn.Module, a: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(m, nn.Conv2d):
            a = F.unfold(a, m.kernel_size, m.dilation, m.padding, m.stride).mT
            g = g.flatten(2).mT
        else:
            a, g = a.unsqueeze(1), g.unsqueeze(1)
        return (torch.cat([a, torch.ones_like(a[..., :1])], -1) if m.bias is not None else a), g

    def __call__(self, train: list, queries: list) -> tuple[Tensor, Tensor]:
        """Scores ``(q, n)`` and self-scores ``(n,)``."""
        parts = [self.captured(x, y) for x, y in queries]
        coordinates = []
        for j, (ua, ug, w) in enumerate(self.blocks):
            rows = [torch.einsum("nto,nti->noi", p[j][1] @ ug, p[j][0] @ ua) * w for p in parts]
            coordinates.append(torch.cat(rows))
        scores, own = [], []
        for x, y in train:
            total, mine = 0, 0
            for (a, g), (ua, ug, w), p in zip(self.captured(x, y), self.blocks, coordinates):
                a, g = a @ ua, g @ ug
                rows = torch.einsum("nto,nti->noi", g, a) if self.by_rows or a.shape[1] > 1 else None
                if rows is not None:
                    total = total + p.flatten(1) @ rows.flatten(1).T
                    mine = mine + (rows.square().flatten(1) @ w.flatten())
                else:
                    a, g = a[:, 0], g[:, 0]
                    total = total + torch.einsum("qon,no->qn", p @ a.T, g)
                    mine = mine + ((g.square() @ w) * a.square()).sum(1)
            scores.append(total)
            own.append(mine)
        return torch.cat(scores, 1), torch.cat(own)


def contenders(name: str, q: int, n: int) -> dict[str, Callable[[], Any]]:
    """Ours and both ways of the hand-written version; raises where they disagree."""
    w = workload(name, n, 128)
    queries = workload(name, q, min(q, 100)).batches
    matrix = nng.EmpiricalFIM(w.model, w.batches[:2], nng.PMatEKFAC, loss="cross_entropy")
    ours = lambda: nng.influence(w.model, w.batches, queries, matrix, loss="cross_entropy", damping=DAMPING)
    found = {"nngeom": ours}
    for label, by_rows in {"by hand, inputs first": False, "by hand, rows first": True}.items():
        hand = ByHand(w.model, matrix, by_rows)
        found[label] = lambda hand=hand: hand(w.batches, queries)
        scores, own = found[label]()
        result = ours()
        for mine, theirs in ((result.scores, scores), (result.self_scores, own)):
            if not torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max())):
                raise SystemExit(f"{label} disagrees by {float((mine - theirs).abs().max()):.1e}")
    return found


def main(argv: list[str] | None = None) -> None:
    """Print one line a workload and number of queries."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.influence", description=__doc__)
    parser.add_argument("--workload", nargs="*", default=["W1", "W3"])
    parser.add_argument("--queries", nargs="*", type=int, default=[8, 200])
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    for name in options.workload:
        for q in options.queries:
            start = time.perf_counter()
            found = contenders(name, q, options.examples)
            floor = workload(name, options.examples, 128).floor
            timed = {k: s.summary() for k, s in interleaved(floor, found, options.repeats).items()}
            best = min(v["median_ms"] for k, v in timed.items() if k not in ("nngeom", "floor"))
            cells = "  ".join(f"{k} {v['median_ms']:.0f} ms ({v['ratio']:.1f})" for k, v in timed.items())
            ratio = timed["nngeom"]["median_ms"] / best
            print(f"{name} q={q}: {cells}  ratio {ratio:.2f}  [{time.perf_counter() - start:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
