import torch
import torch.distributed as dist
from torch import nn

import nngeom as nng

dist.init_process_group("gloo")
torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), torch.randn(100, 8)
mine = [(x[dist.get_rank() :: 2],)]
fisher = nng.FIM(model, mine, nng.PMatKFAC, process_group=dist.group.WORLD)
print(fisher.examples, fisher.trace().item())
dist.destroy_process_group()
