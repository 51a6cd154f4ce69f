"""
Do influences tell the truth: a linear datamodelling score
==========================================================

Only training anew tells. Nets are trained on random halves of 120 digits, and the losses of queries that they give
are correlated with those that summed scores predict. :doc:`/influence` has the same experiment with more nets.
"""

import matplotlib.pyplot as plt
import torch
from digits import digits, mlp, train
from torch.nn import functional as F

import nngeom as nng
from nngeom import analysis

x, y, x_test, y_test = digits(train=120)
query, label = x_test[:40], y_test[:40]
halves = torch.rand(16, len(x), generator=torch.Generator().manual_seed(0)) < 0.5


def trained(chosen):
    """A small net trained on some of the digits."""
    return train(mlp(width=10), x[chosen], y[chosen], steps=150, decay=0.3)


losses = []
for half in halves:
    losses.append(F.cross_entropy(trained(half)(query), label, reduction="none").detach())
losses = torch.stack(losses)
model = trained(torch.ones(len(x), dtype=torch.bool))

quality = {}
for kind in (nng.PMatEye, nng.PMatDiag, nng.PMatKFAC, nng.PMatEKFAC, nng.PMatBlockDiag):
    matrix = nng.GGN(model, (x, y), kind, loss="cross_entropy")
    damping = 1.0 if kind is nng.PMatEye else 1e-2
    scores = nng.influence(model, (x, y), (query, label), matrix, loss="cross_entropy", damping=damping).scores
    quality[kind.__name__[4:]] = analysis.linear_datamodeling_score(scores, losses, halves)
for name, q in quality.items():
    print(f"{name:10s} {q.mean:.2f} between {q.interval[0]:.2f} and {q.interval[1]:.2f}")
    plt.errorbar(name, q.mean, [[q.mean - q.interval[0]], [q.interval[1] - q.mean]], fmt="o")
plt.ylabel("rank correlation with truth")
plt.show()
