"""
Say how sure you are: Laplace predictions
=========================================

A net that was trained on few digits until it is too sure of itself, and two Laplace approximations of it by
``laplace-torch`` with this library's curvature. Averaging over the posterior, at a precision of the prior that other
held-out digits choose, lowers the negative log-likelihood. There the prior has most of the posterior, and both
structures agree; at smaller precisions, where the curvature has it, Kronecker factors are better than a diagonal.
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
figure, (left, right) = plt.subplots(1, 2)


def show(name, p, style):
    """Confidence and accuracy of each tenth, from unsure to sure, and the expected calibration error."""
    sure, right_ones = p.max(-1).values, (p.argmax(-1) == y_test).float()
    parts = sure.argsort().chunk(10)
    points = [(sure[i].mean().item(), right_ones[i].mean().item()) for i in parts]
    right.plot(*zip(*points), style, label=name)
    nll, error = F.nll_loss(p.log(), y_test).item(), sum(abs(a - b) for a, b in points) / 10
    print(f"{name:14s} negative log-likelihood {nll:.3f}, calibration error {error:.3f}")
    return nll


right.plot([0.5, 1], [0.5, 1], "k:", lw=1)
left.axhline(show("the net itself", model(x_test).softmax(-1).detach(), "C0o-"), color="C0")
for structure, style in (("diag", "C1o-"), ("kron", "C2o--")):
    la = Laplace(model, "classification", "all", structure, backend=NNGeomGGN)
    la.fit(DataLoader(TensorDataset(x, y), batch_size=100))
    val, test = {}, {}
    for precision in (1.0, 3.0, 10.0, 30.0, 100.0):  # chosen on 200 digits that the test does not see
        la.prior_precision = precision
        val[precision] = F.nll_loss(la(x_val).log(), y_val).item()
        test[precision] = F.nll_loss(la(x_test).log(), y_test).item()
    la.prior_precision = best = min(val, key=val.get)
    left.loglog(test.keys(), test.values(), style)
    show(f"Laplace, {structure}", la(x_test).detach(), style)
    print(f"{'':14s} at a precision of {best:.0f}; at 1 {test[1.0]:.3f}")
left.set_xlabel("precision of the prior")
left.set_ylabel("negative log-likelihood")
right.set_xlabel("confidence")
right.set_ylabel("accuracy")
right.legend()
plt.show()
