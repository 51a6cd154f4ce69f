"""What was sent is emptied, and what it was a view of is not."""

import torch
from torch import nn

from nngeom.ranks.let_go import let_go


def test_views_are_emptied_and_their_bases_are_not():
    base, parameter = torch.arange(6.0), nn.Parameter(torch.ones(2, 3))
    sent = [base[:4], base.view(-1), parameter.view(-1), torch.ones(3)]
    let_go(sent)
    assert [x.numel() for x in sent] == [0] * 4
    assert base.tolist() == [0, 1, 2, 3, 4, 5] and bool((parameter == 1).all())
