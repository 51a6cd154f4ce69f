"""
Remember an old task: EWC
=========================

A net learns the digits 0 to 4, then 5 to 9. Elastic weight consolidation adds the quadratic form of the old task's
Fisher matrix around the old weights to the new loss; the representation says how much of the matrix is kept.
"""

import matplotlib.pyplot as plt
import torch
from digits import accuracy, digits, mlp, train

import nngeom as nng

x, y, x_test, y_test = digits()
old, new, old_test, new_test = y < 5, y >= 5, y_test < 5, y_test >= 5
start = train(mlp(), x[old], y[old], steps=300)
anchor = nng.PVector.from_model(start)

kinds = {"none": None, "Diag": nng.PMatDiag, "KFAC": nng.PMatKFAC, "EKFAC": nng.PMatEKFAC}
kept, learnt = {}, {}
for name, kind in kinds.items():
    model = mlp(start)
    fisher = kind and nng.FIM(start, (x[old], y[old]), kind)

    def penalty(model, fisher=fisher):
        if fisher is None:
            return 0.0
        return 300 * fisher.vTMv(nng.PVector.from_model(model, live=True) - anchor)

    train(model, x[new], y[new], steps=150, penalty=penalty)
    kept[name] = accuracy(model, x_test[old_test], y_test[old_test])
    learnt[name] = accuracy(model, x_test[new_test], y_test[new_test])
    print(f"{name:6s} old {kept[name]:.3f}  new {learnt[name]:.3f}")

position = torch.arange(len(kinds))
plt.bar(position - 0.2, kept.values(), 0.4, label="old task, 0 to 4")
plt.bar(position + 0.2, learnt.values(), 0.4, label="new task, 5 to 9")
plt.xticks(position, kinds)
plt.ylabel("test accuracy")
plt.ylim(0, 1.2)
plt.legend(loc="upper left", ncols=2)
plt.show()
