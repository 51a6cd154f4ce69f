"""
Say how sure you are: Laplace predictions
=========================================

A net that was trained on few digits until it is too sure of itself, and two Laplace approximations of it by
``laplace-torch`` with this library's curvature. Averaging over the posterior lowers the negative log-likelihood of
held-out digits.
"""

import matplotlib.pyplot as plt
from digits import digits, mlp, train
from laplace import Laplace
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from nngeom.interop.laplace import NNGeomGGN

x, y, x_test, y_test = digits(train=200)
(x_val, x_test), (y_val, y_test) = (t.split([200, len(t) - 200]) for t in (x_test, y_test))
model = train(mlp(), x, y, steps=600, lr=3e-2)
loader = DataLoader(TensorDataset(x, y), batch_size=100)


def calibration(p, bins=10):
    """Confidence and accuracy of each tenth, from unsure to sure, and the expected calibration error."""
    sure, right = p.max(-1).values, (p.argmax(-1) == y_test).float()
    parts = sure.argsort().chunk(bins)
    points = [(sure[i].mean().item(), right[i].mean().item()) for i in parts]
    return points, sum(abs(a - b) for a, b in points) / bins


predictions = {"the net itself": model(x_test).softmax(-1).detach()}
for structure in ("diag", "kron"):
    la = Laplace(model, "classification", "all", structure, backend=NNGeomGGN)
    la.fit(loader)
    losses = {}
    for la.prior_precision in (3.0, 10.0, 30.0, 100.0):  # chosen on 200 digits that the test does not see
        losses[la.prior_precision.item()] = F.nll_loss(la(x_val).log(), y_val).item()
    la.prior_precision = min(losses, key=losses.get)
    predictions[f"Laplace, {structure}"] = la(x_test).detach()
plt.plot([0, 1], [0, 1], "k:", lw=1)
for name, p in predictions.items():
    points, error = calibration(p)
    nll = F.nll_loss(p.log(), y_test).item()
    print(f"{name:16s} negative log-likelihood {nll:.3f}, calibration error {error:.3f}")
    plt.plot(*zip(*points), marker="o", label=name)
plt.xlabel("confidence")
plt.ylabel("accuracy")
plt.legend()
plt.show()
