"""
Find wrong labels: self-influence
=================================

One label in ten is wrong. An example that changes its own loss a lot when it gets more weight is one that the
others do not explain: sorted by self-influence the wrong labels come first. So they do by the loss, as long as the
net has not learnt them; self-influence needs no held-out data either, and its parts say which other examples stand
against a label.
"""

import matplotlib.pyplot as plt
import torch
from digits import digits, mlp, train
from torch.nn import functional as F

import nngeom as nng

x, y, *_ = digits(train=800)
generator = torch.Generator().manual_seed(1)
wrong = torch.rand(len(y), generator=generator) < 0.1
y = torch.where(wrong, (y + torch.randint(1, 10, y.shape, generator=generator)) % 10, y)
model = train(mlp(), x, y, steps=400)

found = {"loss": F.cross_entropy(model(x), y, reduction="none").detach()}
for kind, damping in ((nng.PMatEye, 1.0), (nng.PMatEKFAC, 1e-2)):
    matrix = nng.GGN(model, (x, y), kind, loss="cross_entropy")
    scores = nng.influence(model, (x, y), (x[:1], y[:1]), matrix, loss="cross_entropy", damping=damping)
    found[f"self-influence, {kind.__name__[4:]}"] = scores.self_scores

looked_at = torch.arange(1, len(y) + 1) / len(y)
for name, score in found.items():
    share = wrong[score.argsort(descending=True)].cumsum(0) / wrong.sum()
    print(f"{name:22s} {share[int(0.1 * len(y))]:.0%} of the {int(wrong.sum())} wrong labels in the first tenth")
    plt.plot(looked_at, share, label=name)
plt.plot([0, 1], [0, 1], "k:", lw=1)
plt.xlim(0, 0.4)
plt.xlabel("share of labels looked at")
plt.ylabel("share of wrong ones found")
plt.legend(loc="lower right")
plt.show()

plt.figure(figsize=(6.4, 1.2))
worst = found["self-influence, EKFAC"].argsort(descending=True)[:8]
for place, i in enumerate(worst.tolist()):
    plt.subplot(1, 8, place + 1).imshow(-x[i].view(8, 8), cmap="gray")
    plt.title(f"'{y[i]}'", color="C3" if wrong[i] else "k")
    plt.axis("off")
plt.show()
