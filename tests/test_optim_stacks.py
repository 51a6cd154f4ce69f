"""Small layers of equal shape, multiplied as one stack: the steps are those of layers one by one."""

import copy

import pytest
import torch
from optimizing import close, one_step
from torch import nn

import nngeom as nng
from nngeom.optim import EKFAC, KFAC, SOAP, stacks
from nngeom.optim.stacks import Stacks, arranged

f64 = torch.float64


class Mixed(nn.Module):
    """Linear layers, convolutions and norms of few shapes, in turns; two layers are too wide to be stacked."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList([nn.Linear(9, 9), nn.LayerNorm(9), nn.Linear(9, 9), nn.Linear(9, 80)])
        self.last = nn.ModuleList([nn.Linear(80, 9), nn.Linear(9, 9), nn.LayerNorm(9), nn.Linear(9, 3)])
        self.convolutions = nn.ModuleList([nn.Conv1d(2, 4, 3, padding=1, groups=2), nn.Conv1d(4, 2, 3, padding=1)])
        self.again = nn.Conv1d(2, 4, 3, padding=1, groups=2)

    def forward(self, x):
        for layer in [*self.first, *self.last[:-1]]:
            x = torch.tanh(layer(x))
        h = torch.tanh(self.convolutions[1](torch.tanh(self.convolutions[0](torch.stack([x, -x], 1)))))
        return self.last[-1](x + self.again(h).mean(1))


def mixed():
    torch.manual_seed(0)
    return Mixed().double()


def batch(seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 9, dtype=f64, generator=g), torch.randint(0, 3, (16,), generator=g)


def trained(make, count, monkeypatch=None, largest=None):
    if monkeypatch is not None:
        monkeypatch.setattr(stacks, "LARGEST", largest)
    model = mixed()
    opt = make(model)
    for seed in range(count):
        one_step(opt, *batch(seed))
    return opt, nng.PVector.from_model(model)


MAKERS = {
    "EKFAC": lambda m: EKFAC(m, basis_every=3, statistics_every=2),
    "EKFAC of examples": lambda m: EKFAC(m, scalings="batch", basis_every=3),
    "SOAP": lambda m: SOAP(m, basis_every=2, statistics_every=1),
    "KFAC": lambda m: KFAC(m, inverse_every=3, statistics_every=2),
    "KFAC, exact damping": lambda m: KFAC(m, damping=1e-2, inverse_every=3),
}


@pytest.mark.parametrize("name", MAKERS)
def test_steps_are_those_of_layers_one_by_one(name, monkeypatch):
    opt, stacked = trained(MAKERS[name], 7)
    found = [len(stack.left) for part in opt.partition for stack in part.stacks.stacks]
    assert (not found) == (name == "KFAC, exact damping")  # whose inverses are no Kronecker products
    if found:
        assert sorted(found)[:2] == [3, 4]  # three linear layers of one shape, two convolutions of two groups; norms
    alone, single = trained(MAKERS[name], 7, monkeypatch, 0)
    assert not any(part.stacks.stacks for part in alone.partition)
    assert close(stacked, single, 1e-9)


def test_a_step_is_the_solve():
    model, (x, y) = mixed(), batch(0)
    expected = nng.EmpiricalFIM(model, (x, y), nng.PMatKFAC, loss="cross_entropy")
    opt = KFAC(
        model, lr=1.0, momentum=0.0, kl_clip=None, statistics_decay=0.0, inverse_every=1, drowned=0.0, reduction="mean"
    )
    g, moved = one_step(opt, x, y)
    assert any(part.stacks.stacks for part in opt.partition)
    assert close(moved, expected.solve(g, nng.FactoredTikhonov(1e-2, balanced=False)), 1e-8)


def test_a_loaded_state_goes_on_with_the_stacks():
    opt, _ = trained(MAKERS["KFAC"], 4)
    other = copy.deepcopy(opt.observer.network.model)
    resumed = MAKERS["KFAC"](other)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one in (opt, resumed):
        one_step(one, *batch(9))
    assert all(part.stacks.stacks for part in resumed.partition)
    for p, q in zip(opt.observer.network.model.parameters(), other.parameters()):
        assert torch.equal(p, q)


def test_a_step_inside_of_autocast():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)]
    model, x, y = nn.Sequential(*layers).float(), torch.randn(16, 6), torch.randint(0, 3, (16,))
    steps = []
    for enabled in (False, True):
        opt = KFAC(copy.deepcopy(model), lr=1.0, momentum=0.0, kl_clip=None)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            steps.append(one_step(opt, x, y)[1])
        assert [len(s.left) for part in opt.partition for s in part.stacks.stacks] == [2]
    assert steps[1].dtype == torch.float32 and close(steps[1], steps[0], 0.1)


def test_products_of_pieces_of_one_vector():
    shapes = [(1, 2, 3), (2, 4, 4), (2, 4, 4), (1, 2, 3), (1, 70, 2), (1, 70, 2), (1, 5, 5)]
    layouts = [_Layout(j, shape) for j, shape in enumerate(shapes)]
    blocks = arranged({layout: layout.sizes for layout in layouts})
    assert [layout.sizes for layout in blocks] == sorted(shapes)
    factor = lambda s, p: torch.randn(s, p, p, dtype=f64)
    sides = {layout: (factor(s, o), factor(s, i)) for layout, (s, o, i) in blocks.items()}
    made = Stacks(sides)
    assert [stack.left.shape for stack in made.stacks] == [(2, 2, 2), (4, 4, 4)]
    sizes = [s * o * i for s, o, i in blocks.values()]
    pieces = lambda flat: [x.view(shape) for x, shape in zip(flat.split(sizes), blocks.values())]
    x, y, z = torch.randn(3, sum(sizes), dtype=f64)
    made.product(pieces(x), pieces(y))
    made.back(pieces(x), pieces(z))
    alone = list(made.others(range(len(sizes))))
    assert [list(blocks)[j].sizes for (j,) in alone] == [(1, 5, 5), (1, 70, 2), (1, 70, 2)]
    for j, ((left, right), x_j, y_j, z_j) in enumerate(zip(sides.values(), pieces(x), pieces(y), pieces(z))):
        if (j,) not in alone:
            torch.testing.assert_close(y_j, left.mT @ x_j @ right)
            torch.testing.assert_close(z_j, left @ x_j @ right.mT)
    (left, right), before = next(iter(sides.values())), pieces(x.clone())[0]
    made.product(pieces(x), pieces(x))  # in place
    torch.testing.assert_close(pieces(x)[0], left.mT @ before @ right)


class _Layout:
    """As much of a layout as stacks ask for."""

    def __init__(self, name, sizes):
        self.name, self.sizes = name, sizes
