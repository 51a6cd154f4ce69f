"""
Two processes: torchrun
=======================

The same script under ``torchrun``: each process measures its half of the digits, and both hold the matrix of all of
them, here beside that of one process.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

SCRIPT = """
import torch
import torch.distributed as dist
from digits import digits, mlp
import nngeom as nng

dist.init_process_group("gloo")
x, y, *_ = digits(dtype=torch.float64)
model, rank = mlp().double(), dist.get_rank()
mine = (x[rank::2], y[rank::2])
F = nng.FIM(model, mine, nng.PMatEKFAC, process_group=dist.group.WORLD)
whole = nng.FIM(model, (x, y), nng.PMatEKFAC)
print(f"process {rank}: {len(mine[0])} digits of {F.examples}, trace {F.trace():.12f}, of all {whole.trace():.12f}")
if rank == 0:
    torch.save([F.diag().flat(), whole.diag().flat()], "diagonals.pt")
dist.destroy_process_group()
"""
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "fisher.py"
    path.write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(path)]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(run, capture_output=True, text=True, cwd=folder, env={**os.environ, **paths})
    print(done.stdout or done.stderr[-2000:])
    two, one = torch.load(Path(folder) / "diagonals.pt")
seen = one > 1e-20  # but for weights of pixels that are always blank
plt.loglog(one[seen], two[seen], ".")
plt.xlabel("diagonal of the Fisher matrix, one process")
plt.ylabel("two processes")
plt.show()
