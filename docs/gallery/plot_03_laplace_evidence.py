"""
How wide should the prior be: the Laplace evidence
==================================================

The evidence of a net under a Gaussian prior of precision ``p`` needs ``log det(n F + p)``. With a KFAC matrix at
hand it is a closed form in ``p``, and says without held-out data which prior, and which width of the net, suits.
"""

import math

import matplotlib.pyplot as plt
import torch
from digits import accuracy, digits, mlp, train
from torch.nn import functional as F

import nngeom as nng

x, y, x_test, y_test = digits(train=300)
precisions = torch.logspace(-2, 1.5, 40)
for width in (2, 4, 8, 32):
    model = train(mlp(width=width), x, y, steps=400, decay=0.1)
    fisher = nng.FIM(model, (x, y), nng.PMatKFAC)
    w = nng.PVector.from_model(model)
    loss, n, d = F.cross_entropy(model(x), y, reduction="sum").item(), len(x), w.flat().numel()
    evidence = []
    for p in precisions.tolist():
        logdet = d * math.log(n) + fisher.logdet(p / n)  # of n F + p
        evidence.append(-loss - 0.5 * (p * w.dot(w) + logdet - d * math.log(p)))
    best = torch.tensor(evidence).argmax()
    print(f"width {width:2d}: evidence {evidence[best]:7.1f}, test accuracy {accuracy(model, x_test, y_test):.3f}")
    line = plt.semilogx(precisions, evidence, label=f"{width} hidden units")[0]
    plt.plot(precisions[best], evidence[best], "o", color=line.get_color())
plt.xlabel("precision of the prior")
plt.ylabel("log evidence")
plt.ylim(-700, -150)
plt.legend()
plt.show()
