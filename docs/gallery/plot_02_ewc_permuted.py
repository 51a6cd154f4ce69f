"""
Many tasks, one penalty: permuted digits
========================================

Four tasks, each the digits under another permutation of the pixels. After each task its Fisher matrix is merged
into one (``nng.merge`` weighs by examples): memory is that of one matrix, however many tasks there were. The weight
of the penalty decides between old and new: five times as much keeps the first task and hinders the last one.
"""

import matplotlib.pyplot as plt
import torch
from digits import accuracy, digits, mlp, train

import nngeom as nng

x, y, x_test, y_test = digits()
orders = [torch.randperm(64, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]

for weight, style in ((0.0, "--"), (10.0, "-")):
    model, matrix, curve = mlp(width=64), None, []
    for task, order in enumerate(orders):
        anchor = nng.PVector.from_model(model)

        def penalty(model, matrix=matrix, anchor=anchor, factor=weight * task):
            if factor == 0:
                return 0.0
            return factor * matrix.vTMv(nng.PVector.from_model(model, live=True) - anchor)

        train(model, x[:, order], y, steps=250, penalty=penalty)
        new = nng.FIM(model, (x[:400, order], y[:400]), nng.PMatKFAC)
        matrix = new if matrix is None else nng.merge(matrix, new)
        curve.append([accuracy(model, x_test[:, o], y_test) for o in orders])
    print("penalty" if weight else "nothing", [f"{a:.2f}" for a in curve[-1]], "after the last task")
    for task in range(4):
        plt.plot(range(task + 1, 5), [c[task] for c in curve[task:]], style, color=f"C{task}", marker="o")
plt.xlabel("tasks learnt")
plt.xticks(range(1, 5))
plt.ylabel("test accuracy of each task")
plt.title("solid: with the merged KFAC penalty; dashed: without")
plt.show()
