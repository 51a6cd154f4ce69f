"""Uses that almost fit an adapter: reused, broadcast, complex, given twice, seen through unusual views. All exact."""

from dataclasses import FrozenInstanceError

import pytest
import torch
from exactness import require_exact, require_kernels, require_matrices
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import nngeom as nng
from nngeom.capture.arguments import tensors
from nngeom.capture.network import Network
from nngeom.capture.recorder import record
from nngeom.layers.adapter import ADAPTERS, Call, Use
from nngeom.pullback.backward import gains_from_batching
from nngeom.pullback.captured_pass import Pass

f64 = torch.float64


class Using(nn.Module):
    """A linear map, and one parameter ``p`` used as ``forward(p, h, x)`` says, ``h`` the output of the map."""

    def __init__(self, forward, *shape):
        super().__init__()
        self.map, self.p = nn.Linear(4, 3, dtype=f64), nn.Parameter(torch.randn(shape, dtype=f64))
        self._forward = forward

    def forward(self, x):
        return self._forward(self.p, self.map(x), x)


def fft(x):
    return torch.fft.fft(x)[:, :3]


def complex_view(p):
    return torch.view_as_complex(p)


USES = {
    # the affine parameters of a norm, used elsewhere too
    "norm and scale": (lambda p, h, x: F.layer_norm(h, (3,), p).tanh() * p, (3,)),
    "norm and shift": (lambda p, h, x: F.layer_norm(h, (3,), None, p).tanh() + p, (3,)),
    "norm's bias and linear's": (
        lambda p, h, x: F.linear(F.layer_norm(h, (3,), None, p).tanh(), torch.eye(3, dtype=f64), p),
        (3,),
    ),
    "norm with one for both": (lambda p, h, x: F.layer_norm(h, (3,), p, p), (3,)),
    "norm and rms norm": (lambda p, h, x: F.rms_norm(F.layer_norm(h, (3,), p), (3,), p).tanh(), (3,)),
    "norm and slope": (
        lambda p, h, x: F.prelu(F.batch_norm(h, torch.zeros(3, dtype=f64), torch.ones(3, dtype=f64), p, p), p),
        (3,),
    ),
    "norm of a view": (lambda p, h, x: F.layer_norm(h, (3,), p[1], p[0]), (2, 3)),
    # products with letters of size one
    "einsum, input of one": (lambda p, h, x: torch.einsum("ij,jk->ik", x, p).tanh() + h, (1, 3)),
    "einsum, other of one": (lambda p, h, x: torch.einsum("ij,jk->ik", x[:, :1], p).tanh() + h, (4, 3)),
    "einsum, group of one": (lambda p, h, x: torch.einsum("nd,d->nd", h, p).tanh(), (1,)),
    "einsum, batch of one": (lambda p, h, x: torch.einsum("nd,nd->nd", h, p).tanh(), (1, 3)),
    "einsum, both on the right": (lambda p, h, x: torch.einsum("ni,oi->no", x, p).tanh() + h, (3, 1)),
    "einsum with dots in both": (lambda p, h, x: torch.einsum("...i,...oi->...o", x, p), (1, 3, 4)),
    "einsum without an arrow": (lambda p, h, x: torch.einsum("ai,ib", x, p), (4, 3)),
    "einsum of lists": (lambda p, h, x: torch.einsum(x, [0, 1], p, [2, 1], [0, 2]), (3, 4)),
    "einsum of itself": (lambda p, h, x: h * torch.einsum("ij,ij->j", p, p).tanh(), (4, 3)),
    "einsum of a diagonal": (lambda p, h, x: torch.einsum("ni,ii->ni", x, p)[:, :3], (4, 4)),
    # complex numbers made of real parameters
    "complex product": (lambda p, h, x: (fft(x) * complex_view(p)).abs(), (3, 2)),
    "real and imaginary parts": (lambda p, h, x: ((x[:, :3] + 0j) * (p[..., 0] + 1j * p[..., 1]) + h).abs(), (3, 2)),
    "complex of two": (lambda p, h, x: (torch.complex(p[0], p[1]) * fft(x)).imag.square() + h, (2, 3)),
    "complex linear map": (lambda p, h, x: F.linear(torch.fft.fft(x), complex_view(p)).abs(), (3, 4, 2)),
    "complex matrix product": (lambda p, h, x: (torch.fft.fft(x) @ p.to(torch.complex128)).imag, (4, 3)),
    "complex shift": (lambda p, h, x: (x[:, :3] + complex_view(p)).abs(), (3, 2)),
    "real scale of complex": (lambda p, h, x: (fft(x) * p).abs(), (3,)),
    "real shift of complex": (lambda p, h, x: (fft(x) + p).abs(), (3,)),
    "spectral convolution": (
        lambda p, h, x: torch.fft.irfft(torch.fft.rfft(x) * complex_view(p), n=4)[:, :3] + h.tanh(),
        (3, 2),
    ),
    "complex einsum": (lambda p, h, x: torch.einsum("nk,ko->no", torch.fft.rfft(x), complex_view(p)).imag, (3, 3, 2)),
    "back to real": (lambda p, h, x: torch.view_as_real(fft(x) * complex_view(p)).square().sum(-1), (3, 2)),
    # one parameter in two places of one call
    "linear of itself": (lambda p, h, x: h * F.linear(p, p).sum().tanh(), (3, 3)),
    "linear of its product": (lambda p, h, x: x[:, :3] @ F.linear(p, p).T, (3, 3)),
    "product with itself": (lambda p, h, x: x[:, :3] @ (p @ p), (3, 3)),
    "square": (lambda p, h, x: h * (p * p), (3,)),
    "sum with itself": (lambda p, h, x: (h + (p + p)).tanh(), (3,)),
    "weight and bias": (lambda p, h, x: F.linear(x[:, :3], p[:, :3], p[:, 3]), (3, 4)),
    "bilinear weight and bias": (lambda p, h, x: F.bilinear(x, x, p, p[:, 0, 0]), (3, 4, 4)),
    "convolution of itself": (lambda p, h, x: h * F.conv1d(p, p).sum().tanh(), (2, 2, 2)),
    "inputs and weight": (lambda p, h, x: F.linear(p[:1] + 0 * x[:, :3], p), (3, 3)),
    "input view and bias": (
        lambda p, h, x: F.linear(p[:2].expand(len(x), 2), torch.ones(3, 2, dtype=f64), p[2:]) * h,
        (5,),
    ),
    "lookup in itself": (lambda p, h, x: h * F.embedding((p[:3, 0] > 0).long(), p)[:, 0], (4, 4)),
    # views that are no rectangles
    "strided": (lambda p, h, x: F.linear(x, p.as_strided((3, 4), (1, 1))), (6,)),
    "windows": (lambda p, h, x: F.linear(x, p.unfold(0, 4, 1)), (6,)),
    "one column for all": (lambda p, h, x: F.linear(x, p.expand(3, 4)).tanh() + h, (3, 1)),
    "one row for all": (lambda p, h, x: F.linear(x, p.expand(3, 4)).tanh() + h, (4,)),
    "every other row": (lambda p, h, x: F.linear(x, p[::2]), (6, 4)),
    "every other column": (lambda p, h, x: F.linear(x, p[:, ::2]), (3, 8)),
    "a part, transposed": (lambda p, h, x: F.linear(x, p[1:5, :3].T), (6, 4)),
    "permuted": (lambda p, h, x: F.linear(x, p.permute(1, 0, 2).reshape(3, 4)), (2, 3, 2)),
    "overlapping parts": (lambda p, h, x: F.linear(x, p[:3]) + F.linear(x, p[1:4]).tanh(), (4, 4)),
    "overlapping runs": (lambda p, h, x: (h + p[:3]).tanh() + p[1:4], (5,)),
    "every other entry": (lambda p, h, x: (h + p[::2]).tanh(), (5,)),
    "a diagonal": (lambda p, h, x: h * p.diagonal(), (3, 3)),
    "transposed scale and shift": (lambda p, h, x: (h[:, None] * p.T + p.T).tanh().sum(1), (3, 2)),
    "an alias": (lambda p, h, x: F.linear(x, torch.ops.aten.alias(p)) + p[(slice(None), 0)], (3, 4)),
    "beside its detached self": (lambda p, h, x: F.linear(x, p) * p.detach().sum() + p.data.sum(), (3, 4)),
    "one bias for all": (lambda p, h, x: F.linear(x, torch.ones(3, 4, dtype=f64), p.expand(3)).sin() + h, (1,)),
    "addmm with a bias of one": (lambda p, h, x: torch.addmm(p, x, torch.ones(4, 3, dtype=f64)).sin() + h, (1,)),
    "repeated along itself": (lambda p, h, x: (x + p.repeat(2))[:, :3].tanh() + h, (2,)),
    "keywords": (lambda p, h, x: torch.mul(input=torch.add(input=h, other=p, alpha=2.0).tanh(), other=p), (3,)),
    "unbound rows": (lambda p, h, x: sum((h * row).tanh() for row in p), (2, 3)),
}


@pytest.mark.parametrize("use", USES)
def test_exact_in_every_object(use):
    forward, shape = USES[use]
    require_exact(Using(forward, *shape), torch.randn(5, 4, dtype=f64), hessian=use not in TWICE)


TWICE = {
    "norm and shift",
    "norm's bias and linear's",
}  # torch itself has no second derivatives of norms with a bias alone


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_einsum_of_two(data):
    """Letters shared or not, any of them of size one in one of the operands, in any order."""
    names = data.draw(st.permutations("nabcd"))
    ours = "".join(c for c in names if c != "n" and data.draw(st.booleans()))
    theirs = "n" + "".join(c for c in names if c != "n" and data.draw(st.booleans()))
    theirs = "".join(data.draw(st.permutations(theirs)))
    result = "n" + "".join(c for c in names if c in set(ours + theirs) - {"n"} and data.draw(st.booleans()))
    size = {c: data.draw(st.integers(1, 3)) for c in "abcd"} | {"n": 5}
    one = set(data.draw(st.lists(st.sampled_from("abcd"), max_size=1)))
    other = set(data.draw(st.lists(st.sampled_from("abcd"), max_size=1)))
    shape = [1 if c in one else size[c] for c in ours]
    equation = f"{ours},{theirs}->{result}" if data.draw(st.booleans()) else f"{theirs},{ours}->{result}"
    ramp = torch.arange(1.0, 4.0, dtype=f64)

    def forward(p, h, x):
        shape = [len(x) if c == "n" else 1 if c in other else size[c] for c in theirs]
        place = theirs.index("n")
        y = x[:, :1].sin() * torch.arange(1.0, 1 + torch.Size(shape).numel() // len(x), dtype=f64)
        y = y.view(len(x), *shape[:place], *shape[place + 1 :]).movedim(0, place)
        out = torch.einsum(equation, *((p, y) if equation.startswith(f"{ours},") else (y, p)))
        return h + (out.reshape(len(x), -1).sin().sum(1, keepdim=True) * ramp).tanh()

    torch.manual_seed(0)
    model, x = Using(forward, *shape), torch.randn(5, 4, dtype=f64)
    require_matrices(model, x)
    require_kernels(model, x)


# -- the rule behind: a use explains what it was given, and an adapter that fails explains nothing ---------------------


@pytest.mark.parametrize(
    "error", [IndexError, RuntimeError, KeyError, ValueError, ZeroDivisionError, NotImplementedError]
)
def test_an_adapter_that_fails_sends_its_parameters_to_the_fallback(error, monkeypatch):
    def broken(call, *args, **kwargs):
        raise error("an adapter that did not expect this")

    for function in (F.linear, torch.mul, torch.Tensor.mul, torch.Tensor.__mul__):
        monkeypatch.setitem(ADAPTERS, function, broken)
    model = Using(lambda p, h, x: h.tanh() * p, 3)
    require_exact(model, torch.randn(5, 4, dtype=f64))
    assert {row.structure for row in nng.explain(model, (torch.randn(2, 4, dtype=f64),)).rows} == {"fallback"}


@pytest.mark.parametrize(
    "function, arguments, slots",
    [
        (F.linear, lambda p, x: (x, p), 1),
        (F.linear, lambda p, x: (p, p), None),
        (F.linear, lambda p, x: (x, p, p[0]), 2),
        (torch.addmm, lambda p, x: (p[0], p, p), None),
        (torch.einsum, lambda p, x: ("ni,oi->no", [x, p]), 1),
        (torch.mul, lambda p, x: (x, p[0]), None),
        (F.layer_norm, lambda p, x: (p, (3,), torch.ones(3), p[0]), None),
    ],
)
def test_each_parameter_of_a_call_is_explained_once(function, arguments, slots):
    p, x = nn.Parameter(torch.randn(3, 3)), torch.randn(2, 3)
    args = arguments(p, x)
    find = lambda t: ("p", p) if t is p or t._base is p else None
    try:
        parameters = [t for t in tensors(args) if find(t) is not None]
        use = ADAPTERS[function](Call(find, function(*args), len(parameters), keep_graph=False), *args)
    except Exception:
        use = None
    assert (use and len(use.slots)) == slots


# -- the name of an operation decides nothing --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convex", "linear"])
def test_an_adapter_is_taken_for_no_other_by_its_name(name, monkeypatch):
    def named(call, input, weight, bias=None):
        x = call.keep(input)
        lead, gradients, inputs = tuple(input.shape[:-1]), lambda g: g.unsqueeze(-2), lambda: x.unsqueeze(-2)
        return Use(name, call.matrix(weight), call.vector(bias), lead, gradients, inputs)

    monkeypatch.setitem(ADAPTERS, F.linear, named)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(f64)
    network = Network.build(model, None, None)
    uses = [recorded.use for recorded in record(network, (torch.randn(5, 4, dtype=f64),)).uses]
    assert [use.operation for use in uses] == [name, name]
    assert gains_from_batching(uses, create_graph=False)
    assert not gains_from_batching(uses, create_graph=True)
    require_exact(model, torch.randn(5, 4, dtype=f64))


def test_adapters_say_how_a_backward_pass_goes_through_them():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)).to(f64)
    network = Network.build(model, None, None)
    conv, linear = (recorded.use for recorded in record(network, (torch.randn(5, 1, 4, 4, dtype=f64),)).uses)
    assert conv.serial and not conv.product and linear.product and not linear.serial
    assert not gains_from_batching([conv, linear], create_graph=False)
    assert gains_from_batching([linear], create_graph=True) and not gains_from_batching([conv], create_graph=True)


def test_what_an_adapter_said_stays():
    """A pass leaves the uses of a capture as they are, whichever parameters it leaves to the fallback."""
    network = Network.build(nn.Linear(4, 3, dtype=f64), None, None)
    seen = record(network, (torch.randn(5, 4, dtype=f64),))
    (recorded,) = seen.uses
    run = Pass(network, seen, {"bias"})
    assert [slot.name for slot in recorded.use.slots] == ["weight", "bias"] and seen.uses == [recorded]
    assert [slot.name for slot in run.capture.uses[0].use.slots] == ["weight"]
    with pytest.raises(FrozenInstanceError):
        recorded.use.weight = None
    with pytest.raises(FrozenInstanceError):
        recorded.edge = None


def test_a_product_of_scaled_gradients_has_the_right_trace(monkeypatch):
    """``product`` promises that gradients are read as they are; one that scales them is found out."""
    torch.manual_seed(0)

    def halved(call, input, weight, bias=None):
        x = call.keep(input)
        lead, gradients, inputs = tuple(input.shape[:-1]), lambda g: 2 * g.unsqueeze(-2), lambda: x.unsqueeze(-2) / 2
        return Use("halved", call.matrix(weight), None, lead, gradients, inputs, product=True)

    monkeypatch.setitem(ADAPTERS, F.linear, halved)
    model, x = nn.Linear(4, 3, bias=False, dtype=f64), torch.randn(5, 4, dtype=f64)
    exact = nng.mgs.trace_penalty(model, x)
    found = [nng.mgs.trace_penalty(model, x, "rademacher", samples=200) for _ in range(5)]
    torch.testing.assert_close(torch.stack(found).mean(), exact, rtol=0.05, atol=0)
