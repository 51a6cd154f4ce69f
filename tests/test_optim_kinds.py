"""Every representation trains, however many sweeps it takes: a step is the solve with the matrix of the batch."""

import io

import pytest
import torch
from cases import build
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.optim import EKFAC, NaturalGradient
from nngeom.optim.averaged import Averaged
from nngeom.optim.curvature import Curvature, keeps
from nngeom.optim.eigenbasis import Eigenbasis
from nngeom.pmat.diag import DiagBlock
from nngeom.pmat.kfac import factor_statistic, kronecker_blocks
from nngeom.pmat.pmat import PMat

f64 = torch.float64


class PMatPlainSubclass(nng.PMatEKFAC):
    """EKFAC under another name."""


class PMatReduced(nng.PMatEKFAC):
    """EKFAC with another default, by the recipe of its parent."""

    @classmethod
    def recipe(cls, selection, sharing="reduce", sua=False, block_limit=4096):
        return (yield from super().recipe(selection, sharing=sharing, sua=sua, block_limit=block_limit))


class PMatDoubled(nng.PMatEKFAC):
    """What is changed after the parent's recipe must not be lost."""

    @classmethod
    def recipe(cls, selection):
        blocks = yield from super().recipe(selection)
        return {layout: block.scaled(2.0) for layout, block in blocks.items()}


class PMatTwo(PMat):
    """Fourth moments over second ones, coordinate by coordinate: two sweeps, no Kronecker product."""

    passes = 2

    @classmethod
    def recipe(cls, selection):
        means = yield lambda chunk: {layout: {"v": j.square()} for layout, j in chunk.jacobians.items()}
        scale = {layout: t["v"].sqrt() + 1e-3 for layout, t in means.items()}

        def whitened(chunk):
            return {
                layout: {"g": (j.matrix() / scale[layout]).square().sum((0, 1))}
                for layout, j in chunk.jacobians.items()
            }

        second = yield whitened
        return {layout: DiagBlock(t["g"] + means[layout]["v"]) for layout, t in second.items()}


class PMatThree(PMat):
    """Three sweeps: a Kronecker eigenbasis, its spectrum, and the diagonal in that basis once more."""

    passes = 3

    @classmethod
    def recipe(cls, selection):
        means = yield factor_statistic("expand", 4096)
        bases = {layout: block.eigen() for layout, block in kronecker_blocks(means).items()}
        rotated = lambda chunk: {
            lay: {"d": j.rotate(bases[lay].ua, bases[lay].ug).square()} for lay, j in chunk.jacobians.items()
        }
        spectrum = yield rotated
        diagonal = yield lambda chunk: {lay: {"d": j.square()} for lay, j in chunk.jacobians.items()}
        return {lay: DiagBlock(diagonal[lay]["d"] + 0.1 * spectrum[lay]["d"]) for lay in bases}


class PMatByString(PMat):
    """Statistics of blocks under names of their own: one number a layer, of the gradients, and one of both."""

    @classmethod
    def recipe(cls, selection):
        spans = {selection.collection.span(names): layer for layer, names in selection.by_layer().items()}

        def statistic(chunk):
            sums = {}
            for layout, j in chunk.jacobians.items():
                layer = next(layer for span, layer in spans.items() if set(span.names) >= set(layout.names))
                sums[layer] = sums.get(layer, 0) + j.square().sum()
            return {("trace", 7, layer): {"t": t} for layer, t in sums.items()}

        means = yield statistic
        return {
            span: DiagBlock((means["trace", 7, layer]["t"] / span.numel).expand(1, 1, span.numel))
            for span, layer in spans.items()
        }


class PMatUndeclared(PMatTwo):
    """Two sweeps, not declared."""

    passes = 1


KINDS = {
    "subclass": PMatPlainSubclass,
    "reduced": PMatReduced,
    "doubled": PMatDoubled,
    "two": PMatTwo,
    "three": PMatThree,
    "strings": PMatByString,
    "options": PMatPlainSubclass.options(sharing="reduce"),
    "mixed": nng.PMatMixed({"*bias*": PMatTwo}, default=PMatDoubled),
    "nested": nng.PMatMixed({"*bias*": nng.PMatMixed({"*": PMatThree})}, default=PMatPlainSubclass),
}


def observed(opt, model, x, y, reduction="mean", cuts=1):
    """One step, and what it subtracted; the gradient it had."""
    opt.zero_grad()
    for part in range(cuts):
        with opt.observe(reduction):
            loss = F.cross_entropy(model(x[part::cuts]), y[part::cuts], reduction="sum")
            (loss / len(x) if reduction == "mean" else loss).backward()
    before = nng.PVector.from_model(model)
    grads = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    gradient = nng.PVector.from_dict(before.layer_collection, grads)
    opt.step()
    return gradient, before - nng.PVector.from_model(model)


def same(x, y, tolerance=1e-9):
    torch.testing.assert_close(x.flat(), y.flat(), rtol=tolerance, atol=tolerance * float(y.flat().abs().max()))


# Means over positions leave eigenvectors of zero, of which there is a choice, and rows that are not zero along them.
UNDETERMINED = {(kind, name) for kind in ("reduced", "options") for name in ("conv2d", "transformer")}


@pytest.mark.parametrize(
    "kind, name", [(k, n) for k in KINDS for n in ("mlp", "conv2d", "transformer") if (k, n) not in UNDETERMINED]
)
def test_step_is_solve(kind, name):
    case = build(name, sizes=(30,))
    x, y = case.loader[0]
    for reduction, cuts in (("mean", 1), ("sum", 1), ("mean", 2)):
        opt = NaturalGradient(
            case.model, KINDS[kind], lr=1.0, momentum=0.0, kl_clip=None, damping=1e-2, statistics_decay=0.0
        )
        for _ in range(2):
            matrix = nng.EmpiricalFIM(case.model, (x, y), KINDS[kind], loss="cross_entropy")
            gradient, step = observed(opt, case.model, x, y, reduction, cuts)
            same(step, matrix.solve(gradient, 1e-2))
            with torch.no_grad():
                for p in case.model.parameters():
                    p.mul_(0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_step_is_solve_under_a_likelihood(kind):
    case = build("mlp", sizes=(6,))
    options = dict(
        lr=1.0, momentum=0.0, kl_clip=None, damping=1e-2, statistics_decay=0.0, fisher="exact", likelihood="categorical"
    )
    opt = NaturalGradient(case.model, KINDS[kind], **options)
    matrix = nng.FIM(case.model, case.loader, KINDS[kind])
    gradient, step = observed(opt, case.model, *case.loader[0])
    same(step, matrix.solve(gradient, 1e-2))


def test_first_sweeps_are_averaged_and_later_ones_are_of_the_step():
    case = build("mlp", sizes=(5, 5))
    opt = NaturalGradient(case.model, PMatTwo, lr=1.0, momentum=0.0, kl_clip=None, damping=1e-2, statistics_decay=0.5)
    squares, weight = 0.0, 0.0
    for x, y in case.loader:
        each = nng.EmpiricalFIM(case.model, (x, y), nng.PMatDiag, loss="cross_entropy").diag().flat()
        rows = nng.Jacobian(
            case.model, (x, y), function=lambda x, y: F.cross_entropy(case.model(x), y, reduction="none")[:, None]
        ).tensor[0]
        squares, weight = 0.5 * squares + 0.5 * each, 0.5 * weight + 0.5
        mean = squares / weight
        expected = ((rows / (mean.sqrt() + 1e-3)).square().mean(0) + mean + 1e-2).reciprocal()
        gradient, step = observed(opt, case.model, x, y)
        same(step, nng.PVector.from_flat(opt.collection, expected * gradient.flat()))


@pytest.mark.parametrize("kind", KINDS)
def test_between_refreshes_the_inverse_stays_and_resuming_is_bitwise(kind):
    case = build("mlp", sizes=(5, 6, 7))
    make = lambda model: NaturalGradient(model, KINDS[kind], lr=0.1, damping=0.1, every=3, statistics_every=2)
    opt = make(case.model)
    held = []
    for turn in range(4):
        observed(opt, case.model, *case.loader[turn % 3])
        held.append(
            [
                t.clone()
                for part in opt.partition
                for b in part.blocks.values()
                for t in b.fields().values()
                if isinstance(t, torch.Tensor)
            ]
        )
    if not any(isinstance(part, Eigenbasis) for part in opt.partition):
        assert all(torch.equal(a, b) for a, b in zip(held[0], held[2])) and not all(
            torch.equal(a, b) for a, b in zip(held[2], held[3])
        )
    file = io.BytesIO()
    torch.save([opt.state_dict(), case.model.state_dict()], file)
    file.seek(0)
    saved, weights = torch.load(file, weights_only=True)
    again = build("mlp", sizes=(5, 6, 7)).model
    again.load_state_dict(weights)
    second = make(again)
    second.load_state_dict(saved)
    for turn in range(4, 8):
        observed(opt, case.model, *case.loader[turn % 3])
        observed(second, again, *case.loader[turn % 3])
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), again.parameters()))


def test_a_subclass_of_ekfac_is_kept_as_ekfac():
    case, other = build("mlp", sizes=(6,)), build("mlp", sizes=(6,))
    mine = NaturalGradient(case.model, PMatPlainSubclass, lr=0.1, every=3, scalings="running")
    theirs = EKFAC(other.model, lr=0.1, momentum=0.9, basis_every=3, statistics_every=1)
    for _ in range(4):
        observed(mine, case.model, *case.loader[0])
        observed(theirs, other.model, *other.loader[0])
    assert all(torch.equal(p, q) for p, q in zip(case.model.parameters(), other.model.parameters()))
    assert [type(part) for part in mine.partition] == [Eigenbasis]


def test_eigenvalues_in_a_kept_basis_train_too():
    case = build("mlp", sizes=(6,))
    x, y = case.loader[0]
    kept = nng.FIM(case.model, (x, y), nng.PMatEKFAC)
    representation = nng.PMatEKFAC.in_basis(kept)
    opt = NaturalGradient(
        case.model, representation, lr=1.0, momentum=0.0, kl_clip=None, damping=1e-2, statistics_decay=0.0
    )
    matrix = nng.EmpiricalFIM(case.model, (x, y), representation, loss="cross_entropy")
    gradient, step = observed(opt, case.model, x, y)
    same(step, matrix.solve(gradient, 1e-2))


def test_a_second_sweep_that_is_not_declared_is_said():
    case = build("mlp", sizes=(6,))
    opt = NaturalGradient(case.model, PMatUndeclared)
    with pytest.raises(nng.UnsupportedError, match=r"PMatUndeclared takes a second sweep.*passes = 2"):
        observed(opt, case.model, *case.loader[0])


def test_a_new_way_of_keeping_curvature_comes_from_outside():
    class PMatMine(nng.PMatDiag):
        pass

    @keeps(PMatMine)
    class Mine(Curvature):
        """Divides by two."""

        def observe(self, chunk, schedule):
            self.blocks = {
                self.selection.span(): DiagBlock(torch.full((1, 1, self.selection.span().numel), 0.5, dtype=f64))
            }

        def precondition(self, gradient, seen, schedule):
            gradient.mul_(0.5)

    class PMatOther(PMatMine):
        @classmethod
        def recipe(cls, selection):
            return (yield from super().recipe(selection))

    case = build("mlp", sizes=(6,))
    opt = NaturalGradient(case.model, PMatMine, lr=1.0, momentum=0.0, kl_clip=None)
    gradient, step = observed(opt, case.model, *case.loader[0])
    same(step, gradient / 2)
    opt = NaturalGradient(case.model, PMatOther, lr=1.0, momentum=0.0, kl_clip=None)
    observed(opt, case.model, *case.loader[0])
    assert [type(part) for part in opt.partition] == [Averaged]


def test_a_layer_that_appears_later_is_preconditioned_at_once():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.both = nn.Linear(4, 3), nn.Linear(4, 3), False

        def forward(self, x):
            return self.a(x) + self.b(x.sin()) if self.both else self.a(x)

    torch.manual_seed(0)
    model, x, y = Gated().double(), torch.randn(6, 4, dtype=f64), torch.tensor([0, 1, 2, 0, 1, 2])
    opt = NaturalGradient(
        model, nng.PMatKFAC, lr=1.0, momentum=0.0, kl_clip=None, damping=1e-2, every=5, statistics_decay=0.5
    )
    observed(opt, model, x, y)
    model.both = True
    late = nng.LayerCollection.from_model(model, include="b")
    block = nng.EmpiricalFIM(model, (x, y), nng.PMatKFAC, loss="cross_entropy", layer_collection=late)
    gradient, step = observed(opt, model, x, y)
    mine = lambda v: nng.PVector.from_dict(late, {name: v[name] for name in late.names})
    same(mine(step), block.solve(mine(gradient), 1e-2))


@pytest.mark.parametrize("kind", [nng.PMatEKFAC, PMatTwo, PMatDoubled])
def test_what_is_held_for_the_step_may_be_overwritten_before_it(kind):
    case = build("mlp", sizes=(5, 5))
    width, steps = case.inputs.shape[1], []
    model = nn.Sequential(nn.Linear(width, 4, bias=False), nn.Tanh(), nn.Linear(4, 3)).double()
    for static in (False, True):
        opt = NaturalGradient(model, kind, lr=1.0, momentum=0.0, kl_clip=None, damping=1e-2)
        buffer = torch.empty_like(case.loader[0][0])
        for x, y in case.loader:
            with opt.observe():
                F.cross_entropy(model(buffer.copy_(x) if static else x), y).div(2).backward()
        buffer.zero_()
        before = nng.PVector.from_model(model)
        opt.step()
        steps.append(before - nng.PVector.from_model(model))
        before.copy_to(model)
        opt.zero_grad()
    same(*steps)


def test_rows_have_no_running_average():
    case = build("mlp", sizes=(6, 6))
    opt = NaturalGradient(
        case.model, nng.PMatLowRank, lr=1.0, momentum=0.0, kl_clip=None, damping=1e-2, statistics_decay=0.0
    )
    for x, y in case.loader:
        matrix = nng.EmpiricalFIM(case.model, (x, y), nng.PMatDense, loss="cross_entropy")
        gradient, step = observed(opt, case.model, x, y)
        same(step, matrix.solve(gradient, 1e-2), 1e-7)
    opt = NaturalGradient(case.model, nng.PMatLowRank, statistics_decay=0.9)
    with pytest.raises(nng.ArgumentError, match="statistics_decay=0"):
        observed(opt, case.model, x, y)
