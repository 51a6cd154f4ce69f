"""
Merge two nets: averages in the metric of Fisher
================================================

From the same start one net went on with the digits 0 to 6 and one with 7 to 9. The plain average halves what each
of them knows; ``(F1 + F2)^-1 (F1 w1 + F2 w2)``, the most likely parameters under both of their Laplace posteriors,
takes from each what it is sure of. Neither net saw the other's data, nor does the merge.
"""

import matplotlib.pyplot as plt
from digits import accuracy, digits, mlp, train
from torch.nn import functional as F

import nngeom as nng

x, y, x_test, y_test = digits()
start = train(mlp(), x, y, steps=30)
data = [(x[part], y[part]) for part in (y < 7, y >= 7)]
nets = [train(mlp(start), *part, steps=60) for part in data]
w = [nng.PVector.from_model(net) for net in nets]


def test(name, vector):
    """The negative log-likelihood of all digits under the net with these parameters."""
    net = mlp(start)
    vector.copy_to(net)
    loss = F.cross_entropy(net(x_test), y_test).item()
    print(f"{name:8s} accuracy {accuracy(net, x_test, y_test):.3f}, negative log-likelihood {loss:.3f}")
    return loss


for name, vector in zip(("0 to 6", "7 to 9"), w):
    test(name, vector)
result = {"average": test("average", (w[0] + w[1]) / 2)}
for kind in (nng.PMatDiag, nng.PMatKFAC, nng.PMatDense):
    F1, F2 = (nng.FIM(net, part, kind) * len(part[0]) for net, part in zip(nets, data))
    merged = (F1 + F2).solve(F1.mv(w[0]) + F2.mv(w[1]) + (w[0] + w[1]) / 2, damping=1.0)
    result[kind.__name__[4:]] = test(kind.__name__[4:], merged)
plt.bar(result.keys(), result.values(), color=["0.7"] + ["C0"] * 3)
plt.ylabel("negative log-likelihood, all digits")
plt.show()
