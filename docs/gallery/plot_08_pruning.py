"""
Remove weights: OBD and OBS
===========================

Optimal brain damage removes the weights with the least ``w_i^2 F_ii``. Optimal brain surgeon asks the inverse
instead, ``w_i^2 / (F^-1)_ii``, and moves the others to make up for what is gone.
"""

import matplotlib.pyplot as plt
import torch
from digits import accuracy, digits, mlp, train

import nngeom as nng

x, y, x_test, y_test = digits()
model = train(mlp(), x, y, steps=300, decay=0.1)
w, damping = nng.PVector.from_model(model).flat(), 1e-3
diagonal = nng.FIM(model, (x, y), nng.PMatDiag).diag().flat()
inverse = nng.FIM(model, (x, y), nng.PMatDense).inverse(damping)
variance, rows = inverse.diag().flat(), inverse.to_dense()

saliencies = {"magnitude": w.abs(), "OBD": w**2 * diagonal, "OBS": w**2 / variance}
removed, curves = torch.linspace(0, 0.95, 20), {name: [] for name in saliencies}
lc = nng.LayerCollection.from_model(model)
for name, saliency in saliencies.items():
    order = saliency.argsort()
    for share in removed.tolist():
        gone = order[: int(share * len(w))]
        new = w.clone()
        if name == "OBS" and len(gone):  # w - F^-1 E (E^T F^-1 E)^-1 E^T w: the best change with these at zero
            new -= rows[:, gone] @ torch.linalg.solve(rows[gone][:, gone], w[gone])
        new[gone] = 0
        pruned = mlp(model)
        nng.PVector.from_flat(lc, new).copy_to(pruned)
        curves[name].append(accuracy(pruned, x_test, y_test))
for name, curve in curves.items():
    print(f"{name:10s} accuracy with 70 % removed {curve[14]:.3f}, with 90 % {curve[18]:.3f}")
    plt.plot(removed, curve, label=name)
plt.xlabel("share of parameters removed")
plt.ylabel("test accuracy")
plt.legend(loc="lower left")
plt.show()
