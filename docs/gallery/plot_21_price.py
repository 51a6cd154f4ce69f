"""
The price of everything
=======================

Time of a build and memory kept, for the representations of a perceptron of growing width, next to the floor: one
forward and backward pass over the same 256 digits. :doc:`/benchmarks` has larger models, peers, and how times are
taken.
"""

import time

import matplotlib.pyplot as plt
from digits import digits, mlp
from torch.nn import functional as F

import nngeom as nng

x, y, *_ = digits(train=256)


def seconds(f):
    """The fastest of three calls, after one that does not count."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return min(times[1:])


widths = (8, 16, 32)
kinds = (nng.PMatDiag, nng.PMatKFAC, nng.PMatEKFAC, nng.PMatBlockDiag, nng.PMatDense, nng.PMatLowRank)
figure, (left, right) = plt.subplots(1, 2)
for kind in kinds:
    name, ratios, sizes = kind.__name__[4:], [], []
    fits = [w for w in widths if name not in ("BlockDiag", "Dense") or w < 32]
    for width in fits:
        model = mlp(width=width)
        floor = seconds(lambda model=model: F.cross_entropy(model(x), y).backward())
        ratios.append(seconds(lambda model=model, kind=kind: nng.FIM(model, (x, y), kind)) / floor)
        sizes.append(nng.FIM(model, (x, y), kind).nbytes())
    print(f"{name:10s} width {fits[-1]}: {ratios[-1]:.0f} floors, {sizes[-1] / 1e6:.2f} MB")
    left.loglog(fits, ratios, "o-", label=name)
    right.loglog(fits, sizes, "o-")
for axis in (left, right):
    axis.set_xlabel("width")
    axis.set_xticks(widths, widths)
    axis.minorticks_off()
left.set_ylabel("time, in forward and backward passes")
right.set_ylabel("bytes kept")
figure.legend(loc="outside right center")
plt.show()
