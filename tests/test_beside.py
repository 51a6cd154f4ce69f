"""Work beside each other on several of torch's threads: the bits, errors and settings of one after the other."""

import os
import threading

import pytest
import reference
import torch
from cases import build

import nngeom as nng
from nngeom.core import lapack, linalg
from nngeom.core.beside import LEAST, beside
from nngeom.core.errors import NonFiniteError, SingularError

CPU = torch.device("cpu")


@pytest.fixture(params=[2, 3])
def threads(request, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setattr("nngeom.core.beside._cores", lambda: 8)
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def factor(p: int, r: int, dtype=torch.float32) -> torch.Tensor:
    x = torch.randn(r, p, generator=torch.Generator().manual_seed(p + r), dtype=dtype)
    return (x.T @ x / r)[None]


FACTORS = {
    "large": factor(300, 700),
    "of low rank": factor(300, 40),
    "in float64": factor(260, 300, torch.float64),
    "middle": factor(150, 300),
    "groups": factor(140, 200).repeat(2, 1, 1),
    "small": factor(20, 50),
    "diagonal": torch.rand(1, 400),
}


def cost(f: torch.Tensor) -> float:
    return 0 if linalg.is_diagonal(f) else float(f.shape[0] * f.shape[1] ** 3)


COSTS = {name: cost(f) for name, f in FACTORS.items()}
MORE = dict.fromkeys(range(4), 2.0 * LEAST)


def decomposed(name: str):
    return linalg.factor_eigh(FACTORS[name])


def on_one_thread(name: str):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found = decomposed(name)
    torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("without", [False, True])
def test_the_bits_of_one_thread(threads, without, monkeypatch):
    if without:
        monkeypatch.setattr(lapack, "_libraries", lambda: None)
    found = beside(decomposed, COSTS, CPU)
    assert list(found) == list(FACTORS)
    for name, (values, vectors) in found.items():
        expected_values, expected_vectors = on_one_thread(name)
        assert torch.equal(values, expected_values)
        assert vectors is expected_vectors is None or torch.equal(vectors, expected_vectors)


def test_threads_of_their_own(threads):
    """As many as torch has, each on one of its threads and of the libraries', the most expensive first."""
    seen, together = [], threading.Barrier(threads, timeout=20)

    def make(key):
        if len(seen) < threads:
            seen.append(key)
            together.wait()
        else:
            seen.append(key)
        return threading.get_ident(), torch.get_num_threads(), held()

    costs = {0: 1.0, 1: 2.0 * LEAST, 2: 3.0 * LEAST, 3: 9.0 * LEAST}
    found = beside(make, costs, CPU)
    assert set(seen[:threads]) == {3, 2, 1}.intersection((3, 2, 1)[:threads])
    assert threading.get_ident() not in {ident for ident, _, _ in found.values()}
    assert {number for _, number, _ in found.values()} == {1}
    assert all(set(library) <= {1} for _, _, library in found.values())
    assert list(found) == [0, 1, 2, 3]


def held():
    from threadpoolctl import threadpool_info

    return [x["num_threads"] for x in threadpool_info() if x["internal_api"] == "openblas"]


def test_libraries_are_put_back(threads):
    before = held()
    beside(decomposed, COSTS, CPU)
    assert held() == before


@pytest.mark.parametrize("costs", [{0: 1.0, 1: 2.0}, {0: LEAST, 1: LEAST - 1}, {}])
def test_no_threads_for_small_ones(threads, costs):
    found = beside(lambda key: threading.get_ident(), costs, CPU)
    assert set(found.values()) <= {threading.get_ident()} and list(found) == list(costs)


def test_no_threads_on_one_thread_nor_for_a_device(threads):
    me = {threading.get_ident()}
    assert set(beside(lambda key: threading.get_ident(), MORE, torch.device("cuda")).values()) == me
    torch.set_num_threads(1)
    assert set(beside(lambda key: threading.get_ident(), MORE, CPU).values()) == me
    torch.set_num_threads(threads)


def test_no_threads_where_a_process_has_one_setting(threads, monkeypatch):
    monkeypatch.setattr(torch.backends.openmp, "is_available", lambda: False)
    assert set(beside(lambda key: threading.get_ident(), MORE, CPU).values()) == {threading.get_ident()}


def test_no_threads_on_one_core(threads, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert set(beside(lambda key: threading.get_ident(), MORE, CPU).values()) == {threading.get_ident()}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_modes_are_those_of_the_caller(threads, mode):
    asked = lambda key: (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    with mode():
        assert set(beside(asked, MORE, CPU).values()) == {asked(0)}


def test_gradients_pass(threads):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    sum(beside(lambda key: x[key].square().sum(), MORE, CPU).values()).backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())


@pytest.mark.parametrize("kind", [SingularError, NonFiniteError])
def test_the_first_error_is_raised(threads, kind):
    def make(key):
        if key >= 1:
            raise kind(f"number {key}")

    before = held()
    with pytest.raises(kind, match="number 1"):
        beside(make, {key: key * 2.0 * LEAST for key in range(4)}, CPU)
    assert held() == before


def test_a_factor_that_is_not_finite(threads):
    factors = {0: factor(200, 300), 1: torch.full((1, 200, 200), float("nan"))}
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        beside(lambda key: linalg.factor_eigh(factors[key]), {0: 200.0**3, 1: 200.0**3}, CPU)


def test_no_convergence_is_tried_again(threads, monkeypatch):
    before, failed = lapack.eigh, set()

    def fails(x):
        if threading.get_ident() not in failed:
            failed.add(threading.get_ident())
            raise RuntimeError("did not converge")
        return before(x)

    monkeypatch.setattr(lapack, "eigh", fails)
    factors = {p: factor(p, 2 * p, torch.float64) for p in (270, 280, 290)}
    found = beside(lambda p: linalg.factor_eigh(factors[p]), {p: float(p) ** 3 for p in factors}, CPU)
    assert failed
    for p, (values, vectors) in found.items():
        torch.testing.assert_close(vectors @ values.diag_embed() @ vectors.mT, factors[p], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("graph", [torch.no_grad, torch.enable_grad])
def test_an_eigenbasis_of_a_net(threads, graph):
    """A measure and its rescaling, beside the same on one thread."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(150, 160), torch.nn.Tanh(), torch.nn.Linear(160, 3)).double()
    data = torch.randn(20, 150, dtype=torch.float64), None
    with graph():
        several = nng.FIM(model, data, nng.PMatEKFAC)
    torch.set_num_threads(1)
    one = nng.FIM(model, data, nng.PMatEKFAC)
    torch.set_num_threads(threads)
    v = nng.PVector.randn(one.layer_collection, dtype=torch.float64)
    torch.testing.assert_close(several.mv(v).flat(), one.mv(v).flat(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(several.solve(v, 1e-2).flat(), one.solve(v, 1e-2).flat(), rtol=1e-9, atol=1e-12)


def test_small_nets_are_as_they_were(threads, monkeypatch):
    monkeypatch.setattr("nngeom.core.beside.ThreadPoolExecutor", None)
    c = build("mlp")
    nng.FIM(c.model, c.loader, nng.PMatEKFAC)


@pytest.mark.parametrize("name", ["mlp", "conv2d", "reused", "embedding"])
def test_kernels_on_several_threads(threads, name):
    """Strips are wider there; of the same numbers."""
    c = build(name)
    rows = reference.jacobian(c.model, c.inputs)
    found = nng.GramMatrix(c.model, c.loader).to_dense()
    rows = rows.flatten(0, 1)
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-9, atol=1e-11)


def test_a_kernel_of_several_strips(threads):
    torch.manual_seed(0)
    model, x = torch.nn.Linear(30, 5).double(), torch.randn(110, 30, dtype=torch.float64)
    found = nng.GramMatrix(model, (x, None)).to_dense()
    rows = torch.cat([x, torch.ones(110, 1, dtype=torch.float64)], 1)
    expected = torch.einsum("nm,kl->knlm", rows @ rows.T, torch.eye(5, dtype=torch.float64)).reshape(550, 550)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
