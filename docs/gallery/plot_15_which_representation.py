"""
Which representation: accuracy for memory
=========================================

The exact Fisher matrix of a small convolutional net in nine representations: how much each keeps in memory, and how
well its natural gradient agrees with the dense one's. :doc:`/which_matrix` says in words what to take.
"""

import matplotlib.pyplot as plt
import torch
from digits import digits, train
from torch import nn
from torch.nn import functional as F

import nngeom as nng

x, y, *_ = digits()
torch.manual_seed(0)
layers = [nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 10)]
model = train(nn.Sequential(*layers), x, y, steps=150)
batch = (x[:200], y[:200])
F.cross_entropy(model(x), y).backward()
gradient = nng.PVector.from_grad(model)
damping = 1e-2

kinds = {"Dense": nng.PMatDense, "BlockDiag": nng.PMatBlockDiag, "EKFAC": nng.PMatEKFAC, "KFAC": nng.PMatKFAC}
kinds |= {"QuasiDiag": nng.PMatQuasiDiag, "Diag": nng.PMatDiag, "Eye": nng.PMatEye, "LowRank": nng.PMatLowRank}
kinds["Mixed"] = nng.PMatMixed({"1.*": nng.PMatBlockDiag}, default=nng.PMatEKFAC)
exact = nng.FIM(model, batch, nng.PMatDense).solve(gradient, damping)
for name, kind in kinds.items():
    M = nng.FIM(model, batch, kind)
    try:
        step = M.solve(gradient, damping)
    except nng.SingularError as error:  # a quasi-diagonal matrix may be indefinite
        print(f"{name:10s} {error}")
        continue
    cosine = (step.dot(exact) / step.norm() / exact.norm()).item()
    print(f"{name:10s} {M.nbytes():9d} bytes, cosine with the exact natural gradient {cosine:.3f}")
    plt.semilogx(M.nbytes(), cosine, "o")
    place = {"KFAC": (-12, -14), "EKFAC": (8, -8), "Dense": (-38, -4)}.get(name, (-4, 7))
    plt.annotate(name, (M.nbytes(), cosine), textcoords="offset points", xytext=place)
plt.xlabel("bytes kept")
plt.ylabel("cosine with the exact natural gradient")
plt.show()
