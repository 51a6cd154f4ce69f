"""Parts of matrices, functions of them, and every damping, against the dense matrix in every representation."""

import pickle

import pytest
import torch
from cases import PARAMETER_SPACE, STORED, build, representation
from torch import nn

import nngeom as nng

f64 = torch.float64
MODELS = ["mlp", "conv2d", "transformer", "bare"]
BY_MODEL = pytest.mark.parametrize("name", MODELS)
BY_KIND = pytest.mark.parametrize("kind", STORED)
EXACT_BY_PARAMETER = ("dense", "diag", "block-diag", "eye")


def measured(name, kind):
    case = build(name)
    return nng.FIM(case.model, case.loader, representation(kind, case.model))


def vector(m, *batch):
    g = torch.Generator().manual_seed(0)
    return nng.PVector.randn(m.layer_collection, *batch, dtype=f64, generator=g)


def close(x, y, tol=1e-9):
    torch.testing.assert_close(x, y, rtol=tol, atol=tol * float(y.abs().max()))


def function_of(dense, f):
    values, u = torch.linalg.eigh(dense)
    return (u * f(values)) @ u.T


def definite(m):
    """A damping under which the matrix is positive definite."""
    return 0.1 + 1.5 * max(0.0, -float(torch.linalg.eigvalsh(m.to_dense()).min()))


# -- parts -------------------------------------------------------------------------------------------------------------


def places(lc, names):
    table = lc.offsets()
    spans = [(table[n][0], torch.Size(table[n][1]).numel()) for n in names]
    return torch.cat([torch.arange(lo, lo + size) for lo, size in spans])


@BY_KIND
@BY_MODEL
def test_parts_are_principal_submatrices(name, kind):
    m = measured(name, kind)
    dense, lc = m.to_dense(), m.layer_collection
    layers = lc.by_layer()
    parts = m.by_layer()
    assert list(parts) == list(layers)
    for layer, names in layers.items():
        part, at = parts[layer], places(lc, names)
        assert type(part) is type(m) and part.layer_collection.names == names and part.examples == m.examples
        close(part.to_dense(), dense[at][:, at])
        v = vector(part)
        x = definite(part)
        close(
            part.solve(v, x).flat(), torch.linalg.solve(part.to_dense() + x * torch.eye(len(at), dtype=f64), v.flat())
        )


@BY_KIND
def test_parts_of_several_layers_and_of_layers(kind):
    m = measured("mlp", kind)
    dense, lc = m.to_dense(), m.layer_collection
    assert torch.equal(m["*"].to_dense(), dense)
    if kind in ("ekfac", "mixed-sweeps"):
        return
    for pattern in ("*.weight", ["0.weight", "2"], lambda n: n.endswith("bias")):
        part = m[pattern]
        at = places(lc, part.layer_collection.names)
        close(part.to_dense(), dense[at][:, at])
        assert part[part.layer_collection.names[0]].shape[0] < len(at)


def test_part_of_an_eigenbasis_is_refused():
    with pytest.raises(nng.StructureError, match="all parameters of that block"):
        measured("mlp", "ekfac")["0.weight"]


def test_parts_in_an_eigenbasis_are_measured_anew():
    case = build("conv2d")
    e = nng.FIM(case.model, case.loader, nng.PMatEKFAC)
    part = e["body.0"].rescaled(case.model, case.loader, nng.EmpiricalFIM, loss="cross_entropy")
    whole = e.rescaled(case.model, case.loader, nng.EmpiricalFIM, loss="cross_entropy")
    close(part.to_dense(), whole["body.0"].to_dense())


@pytest.mark.parametrize("kind", ["quasi-diag", "low-rank"])
def test_parts_of_inverses(kind):
    m = measured("mlp", kind)
    inverse = m.inverse(definite(m))
    dense = inverse.to_dense()
    for names in m.layer_collection.by_layer().values():
        for chosen in (names, names[:1], names[1:]):
            at = places(m.layer_collection, chosen)
            if kind == "quasi-diag" or chosen == names:
                close(inverse[list(chosen)].to_dense(), dense[at][:, at])


def test_patterns_of_parts_are_those_of_collections():
    case = build("transformer")
    m = nng.FIM(case.model, case.loader)
    by_name = m["body.0.linear1"]
    for pattern in (case.model.body[0].linear1, "body.0.linear1.*", lambda n, p: "linear1" in n):
        assert m[pattern].layer_collection == by_name.layer_collection
    norms = m[nn.LayerNorm].layer_collection
    assert norms.names == m[lambda n: "norm" in n].layer_collection.names
    assert nng.LayerCollection.from_model(case.model, include=nn.LayerNorm) == norms
    with pytest.raises(nng.CollectionError, match="matches no parameter"):
        m["nothing"]
    with pytest.raises(nng.ArgumentTypeError, match="expected a name"):
        m[3]
    copy = pickle.loads(pickle.dumps(m))
    with pytest.raises(nng.CollectionError, match="use names or globs"):
        copy[nn.LayerNorm]
    assert copy["body.0.linear1"].layer_collection == by_name.layer_collection


def test_the_model_is_not_kept_alive():
    case = build("mlp")
    m = nng.FIM(case.model, case.loader)
    del case
    with pytest.raises(nng.CollectionError, match="not there any more"):
        m[nn.Linear]


def test_tied_parameters_match_by_all_names(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    m = nng.FIM(model, [torch.randn(5, 3, dtype=f64)])
    nng.save(m, tmp_path / "m")
    for matrix in (m, pickle.loads(pickle.dumps(m)), nng.load(tmp_path / "m")):
        assert matrix["2.weight"].layer_collection.names == ("0.weight",)
        assert matrix["2"].layer_collection.names == ("2.bias",)  # the tied weight is of the layer of its first name
        assert [p.layer_collection.names for p in matrix.by_layer().values()] == [("0.weight", "0.bias"), ("2.bias",)]


# -- functions ---------------------------------------------------------------------------------------------------------


@BY_KIND
@BY_MODEL
def test_functions_of_eigenvalues(name, kind):
    m = measured(name, kind)
    for f in (torch.exp, torch.tanh, torch.square, lambda v: v / (v.abs() + 0.3)):
        close(m.apply(f).to_dense(), function_of(m.to_dense(), f), 1e-8)
    total = m.apply(lambda v: v - v.sum())
    close(total.to_dense(), m.to_dense() - m.trace() * torch.eye(m.shape[0], dtype=f64), 1e-8)


@pytest.mark.parametrize("kind", ["dense", "diag", "block-diag", "ekfac", "low-rank", "eye"])
def test_functions_keep_the_kind(kind):
    m = measured("mlp", kind)
    assert type(m.apply(torch.tanh)) is type(m) and type(m.power(0.5)) is type(m) and type(m**2) is type(m)


def test_powers_of_kronecker_products_are_kronecker_products():
    m = measured("conv2d", "kfac")
    for p in (2, 0.5, -0.5):
        n = m if p > 0 else nng.PMatKFAC.from_factors(m.layer_collection, shifted(m.factors()))
        assert type(n**p) is nng.PMatKFAC
        close((n**p).to_dense(), function_of(n.to_dense(), lambda v, p=p: v.clamp_min(0) ** p), 1e-7)
    assert type(m.power(2, 0.1)) is nng.PMatEKFAC


def shifted(factors):
    return {key: tuple(f + 0.1 * torch.eye(f.shape[-1], dtype=f64) for f in pair) for key, pair in factors.items()}


@BY_KIND
@BY_MODEL
@pytest.mark.parametrize("p", [-1, -0.5, -2, 0.5, 0, 1, 3])
def test_powers(name, kind, p):
    m = measured(name, kind)
    x = definite(m)
    damped = m.to_dense() + x * torch.eye(m.shape[0], dtype=f64)
    close(m.power(p, x).to_dense(), function_of(damped, lambda v: v**p), 1e-7)


@BY_KIND
def test_half_powers_twice_are_the_inverse(kind):
    m = measured("conv2d", kind)
    x, v = definite(m), vector(m, 2)
    half = m.power(-0.5, x)
    close(half.mv(half.mv(v)).flat(), m.solve(v, x).flat(), 1e-8)
    close(m.power(-1, x).to_dense(), m.inverse(x).to_dense(), 1e-8)
    close(m.power(0.5, x).to_dense() @ m.power(0.5, x).to_dense(), m.to_dense() + x * torch.eye(m.shape[0], dtype=f64))


@BY_KIND
def test_roots_of_semidefinite_matrices(kind):
    m = measured("mlp", kind)
    if kind == "quasi-diag":
        with pytest.raises(nng.SingularError, match="no real power") as error:
            m**0.5
        m.power(0.5, 1.001 * error.value.needed)
        return
    root = (m**0.5).to_dense()
    close(root @ root, m.to_dense(), 1e-7)


@BY_KIND
@BY_MODEL
def test_spectral_norms(name, kind):
    m = measured(name, kind)
    for n in (m, -2 * m, m.inverse(definite(m))):
        close(n.norm(2), torch.linalg.matrix_norm(n.to_dense(), 2), 1e-8)


def test_powers_that_are_not_defined():
    m = measured("mlp", "dense")
    for kind in STORED:
        singular = 0.0 * measured("mlp", kind)
        with pytest.raises(nng.SingularError):
            singular ** (-1)
    for n in (-1 * m, -1 * measured("mlp", "kfac"), -1 * measured("mlp", "diag")):
        with pytest.raises(nng.SingularError, match="no real power"):
            n**0.5
        close((n**3).to_dense(), torch.linalg.matrix_power(n.to_dense(), 3))
    for p in (True, "2", None, m):
        with pytest.raises(nng.ArgumentTypeError, match="expected a number"):
            m**p
    for d in (nng.Cutoff(0.1), nng.FactoredTikhonov(0.1)):
        with pytest.raises(nng.ArgumentError, match="added to the diagonal"):
            m.power(2, d)


@pytest.mark.parametrize("kind", ["kfac", "low-rank", "eye", "dense"])
def test_functions_that_are_none(kind):
    m = measured("mlp", kind)
    with pytest.raises(nng.NonFiniteError, match="finite there"):
        (0.0 * m).apply(torch.log)
    for f in (torch.sum, lambda v: v > 0, lambda v: 1.0, lambda v: v.to(torch.complex128)):
        with pytest.raises(nng.ArgumentError, match="expected as many"):
            m.apply(f)


@pytest.mark.parametrize("kind", ["low-rank", "eye"])
def test_functions_that_tell_equal_eigenvalues_apart(kind):
    with pytest.raises(nng.ArgumentError, match="equal eigenvalues"):
        measured("mlp", kind).apply(lambda v: torch.arange(len(v), dtype=f64))


def test_functions_of_what_has_no_eigenbasis():
    case = build("mlp")
    implicit = nng.FIM(case.model, case.loader, nng.PMatImplicit)
    lazy = measured("mlp", "dense") @ measured("mlp", "diag")
    for m in (implicit, lazy):
        for refused in (lambda m=m: m**2, lambda m=m: m.power(0.5), lambda m=m: m.apply(torch.exp)):
            with pytest.raises(nng.UnsupportedError, match="materialize"):
                refused()


# -- dampings ----------------------------------------------------------------------------------------------------------


def by_block(m, f):
    """``f`` of the mean eigenvalue of each block, at its places, ``(d,)``."""
    out = torch.zeros(m.shape[0], dtype=f64)
    for layout, block in m.blocks.items():
        layout.scatter_(out, torch.full(layout.sizes, f(float(block.trace()) / layout.numel), dtype=f64))
    return out


def require_damped(m, damping, diagonal, tol=1e-7):
    """All that takes a damping is that of the dense matrix with this added to its diagonal."""
    dense, v = m.to_dense() + torch.diag(diagonal), vector(m, 2)
    expected = torch.linalg.solve(dense, v.flat().T).T
    close(m.solve(v, damping).flat(), expected, tol)
    close(m.inverse(damping).mv(v).flat(), expected, tol)
    close(m.logdet(damping), torch.logdet(dense), tol)
    close(m.power(-1, damping).mv(v).flat(), expected, tol)
    x = m.sample(3, damping, generator=torch.Generator().manual_seed(0)).flat()
    noise = nng.PVector.randn(m.layer_collection, 3, generator=torch.Generator().manual_seed(0), dtype=f64).flat()
    close(((x @ dense) * x).sum(-1), (noise * noise).sum(-1), tol)


@BY_KIND
@BY_MODEL
def test_relative_damping(name, kind):
    m = measured(name, kind)
    if kind != "quasi-diag":  # need not be definite
        require_damped(m, nng.Relative(0.3), by_block(m, lambda mean: 0.3 * mean))


def test_relative_damping_is_differentiable():
    m = measured("mlp", "kfac")
    x = torch.tensor(0.3, dtype=f64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: m.logdet(nng.Relative(x)), x)
    assert torch.autograd.gradcheck(lambda x: m.solve(vector(m), nng.Relative(x)).flat(), x)


@BY_KIND
@BY_MODEL
def test_a_number_a_layer(name, kind):
    m = measured(name, kind)
    lc = m.layer_collection
    first = next(iter(lc.by_layer()))
    spread = nng.PVector.from_dict(
        lc,
        {
            n: torch.full(s, 3.0 if (layer + ".").startswith(first + ".") else 2.0, dtype=f64)
            for n, s, layer in zip(lc.names, lc.shapes, lc.layers)
        },
    ).flat()
    damping = {first: 3.0, "*": 2}
    across = [b for lay, b in m.blocks.items() if len(set(spread[lay.indices().flatten()].tolist())) > 1]
    if all(b.plus_diagonal(torch.zeros(b.sizes, dtype=f64)) is not None for b in across):
        require_damped(m, damping, spread)
    else:
        with pytest.raises(nng.ArgumentError, match="one damping a block"):
            m.solve(vector(m), damping)


def test_a_number_a_layer_is_differentiable():
    for kind in ("dense", "kfac"):
        m = measured("mlp", kind)
        x = torch.tensor([0.3, 0.5], dtype=f64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, m=m: m.logdet({"0": x[0], "2": x[1]}), x)


@BY_KIND
@BY_MODEL
def test_a_number_a_parameter(name, kind):
    m = measured(name, kind)
    prior = vector(m).apply(lambda x: x.abs() + 0.1)
    if kind in EXACT_BY_PARAMETER or (kind, name) == ("quasi-diag", "bare"):  # which has no biases of units
        require_damped(m, prior, prior.flat())
    else:
        for refused in (m.solve, lambda v, x: m.inverse(x), lambda v, x: m.logdet(x), lambda v, x: m.sample(2, x)):
            with pytest.raises(nng.ArgumentError, match="one damping a block"):
                refused(vector(m), prior)


@pytest.mark.parametrize("kind", EXACT_BY_PARAMETER)
def test_a_number_a_parameter_is_differentiable(kind):
    m = measured("mlp", kind)
    x = vector(m).flat().abs().add(0.1).requires_grad_()
    with_prior = lambda x: nng.PVector(m.layer_collection, x)
    assert torch.autograd.gradcheck(lambda x: m.logdet(with_prior(x)), x)
    assert torch.autograd.gradcheck(lambda x: m.solve(vector(m), with_prior(x)).flat(), x)


@BY_KIND
@BY_MODEL
@pytest.mark.parametrize("k", [1, 3, 10_000])
def test_pseudo_inverse_of_the_largest_eigenvalues(name, kind, k):
    m = measured(name, kind)
    values = torch.linalg.eigvalsh(m.to_dense())
    noise = 1e-12 * float(values.abs().max())
    least = max(float(values[-min(k, len(values))]) - noise, noise)
    expected = function_of(m.to_dense(), lambda v: torch.where(v >= least, 1 / v, 0))
    for inverse in (m.inverse(nng.Cutoff(top=k)),):
        close(inverse.to_dense(), expected, 1e-6)
    close(m.solve(vector(m), nng.Cutoff(top=k)).flat(), expected @ vector(m).flat(), 1e-6)


def test_a_number_a_layer_where_layers_lie_in_layers():
    """As ``by_layer`` names them: of a normalised weight and its bias, of packed attention and what is inside of it."""
    torch.manual_seed(0)
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2)).double()
    attention = build("transformer")
    data = [(torch.randn(5, 3, dtype=f64), torch.randint(0, 2, (5,)))]
    for model, loader in ((normed, data), (attention.model, attention.loader)):
        m = nng.FIM(model, loader, nng.PMatBlockDiag)
        lc, v = m.layer_collection, vector(m)
        named = {layer: 0.1 * (j + 1) for j, layer in enumerate(lc.by_layer())}
        added = [torch.full(shape, named[layer], dtype=f64).flatten() for shape, layer in zip(lc.shapes, lc.layers)]
        damped = m.to_dense() + torch.diag(torch.cat(added))
        for given in (named, dict(reversed(named.items()))):
            close(m.solve(v, given).flat(), torch.linalg.solve(damped, v.flat()))
            close(m.logdet(given), torch.linalg.slogdet(damped)[1])
    inner = {"0": 0.1, "*": 1.0}  # a layer alone stands for what is inside of it too
    m = nng.FIM(normed, data, nng.PMatDiag)
    expected = [0.1 if name.startswith("0.") else 1.0 for name in m.layer_collection.names]
    sizes = [torch.Size(shape).numel() for shape in m.layer_collection.shapes]
    assert m.layer_collection.layers[:2] == ("0", "0.parametrizations.weight")
    close(
        m.inverse(inner).diag().flat(),
        1 / (m.diag().flat() + torch.tensor(expected, dtype=f64).repeat_interleave(torch.tensor(sizes))),
    )


def test_dampings_that_are_none():
    m, lc = measured("mlp", "dense"), measured("mlp", "dense").layer_collection
    v = vector(m)
    wrong = [
        (nng.Relative(-1.0), nng.DampingError, "finite number"),
        (nng.Relative("x"), nng.ArgumentTypeError, "expected a number"),
        (vector(m), nng.DampingError, "down to"),
        (vector(m, 2), nng.ArgumentError, "batch"),
        (nng.PVector.zeros(lc).apply(lambda x: x + torch.inf), nng.NonFiniteError, "NaN"),
        (vector(measured("conv2d", "diag")), nng.CollectionError, "another collection"),
        ({"0": 1.0}, nng.ArgumentError, "no pattern"),
        ({"0": 1.0, "3": 1.0}, nng.CollectionError, "matches no parameter"),
        ({"*": "x"}, nng.ArgumentTypeError, "pattern: number"),
        ({"*": -1.0}, nng.DampingError, "finite number"),
    ]
    for damping, error, message in wrong:
        with pytest.raises(error, match=message):
            m.solve(v, damping)
    for top in (0, -1, 1.5, True):
        with pytest.raises(nng.ArgumentError, match="number of eigenvalues"):
            nng.Cutoff(top=top)
    with pytest.raises(nng.DampingError, match="mean eigenvalue"):
        (-1 * m).solve(v, nng.Relative(0.1))


def test_dampings_of_a_stored_matrix_are_refused_elsewhere():
    case = build("mlp")
    kernel, implicit = nng.GramMatrix(case.model, case.loader), nng.FIM(case.model, case.loader, nng.PMatImplicit)
    f, v = nng.FVector(torch.ones(3, case.n, dtype=f64)), vector(implicit)
    for damping in (nng.Relative(0.1), nng.Cutoff(top=2), {"*": 1.0}):
        for solve, b in ((kernel.solve, f), (implicit.solve, v)):
            with pytest.raises(nng.UnsupportedError, match="stored matrix"):
                solve(b, damping)


# -- indefinite matrices -----------------------------------------------------------------------------------------------


@BY_KIND
@BY_MODEL
def test_inverses_of_indefinite_matrices(name, kind):
    m = -1 * measured(name, kind)
    values = torch.linalg.eigvalsh(m.to_dense())
    x = float(-values[0]) / 3 + 1e-3  # in the midst of the spectrum, on no eigenvalue
    assert (values + x).abs().min() > 1e-6
    dense, v = m.to_dense() + x * torch.eye(m.shape[0], dtype=f64), vector(m, 2)
    expected = torch.linalg.solve(dense, v.flat().T).T
    close(m.solve(v, x, indefinite=True).flat(), expected, 1e-7)
    inverse = m.inverse(x, indefinite=True)
    close(inverse.mv(v).flat(), expected, 1e-7)
    close(inverse.to_dense(), torch.linalg.inv(dense), 1e-7)
    close(inverse.norm(), torch.linalg.inv(dense).norm(), 1e-7)
    close(inverse.trace(), torch.linalg.inv(dense).trace(), 1e-7)
    close(inverse.diag().flat(), torch.linalg.inv(dense).diagonal(), 1e-7)
    close(inverse.eigh()[0], torch.linalg.eigvalsh(inverse.to_dense()), 1e-7)
    close((2 * inverse).inverse(0.0, indefinite=True).to_dense(), dense / 2, 1e-6)
    if bool((values + x < 0).any()):
        with pytest.raises(nng.SingularError):
            m.solve(v, x)


def test_hessians_are_solved():
    case = build("mlp")
    for kind in (nng.PMatDense, nng.PMatBlockDiag, nng.PMatDiag):
        h = nng.Hessian(case.model, case.loader, kind, loss="cross_entropy")
        v = vector(h)
        close(
            h.solve(v, 0.01, indefinite=True).flat(),
            torch.linalg.solve(h.to_dense() + 0.01 * torch.eye(h.shape[0], dtype=f64), v.flat()),
            1e-7,
        )


@BY_KIND
def test_singular_ones_have_no_inverse_at_all(kind):
    m = 0.0 * measured("mlp", kind)
    for refused in (lambda: m.solve(vector(m), 0.0, indefinite=True), lambda: m.inverse(0.0, indefinite=True)):
        with pytest.raises(nng.SingularError, match="singular"):
            refused()
    for d in (nng.Cutoff(0.1), nng.FactoredTikhonov(0.1)):
        with pytest.raises(nng.ArgumentError, match="indefinite"):
            m.solve(vector(m), d, indefinite=True)


@pytest.mark.parametrize("kind", PARAMETER_SPACE)
def test_numbers_stay_what_they_were(kind):
    m = measured("mlp", kind)
    v, x = vector(m), definite(m)
    for number in (x, torch.tensor(x, dtype=f64)):
        expected = torch.linalg.solve(m.to_dense() + x * torch.eye(m.shape[0], dtype=f64), v.flat())
        close(m.solve(v, number).flat(), expected, 1e-5)


@pytest.mark.parametrize("kind", ["low-rank", "quasi-diag", "dense"])
def test_what_functions_make_is_saved(tmp_path, kind):
    m = measured("mlp", kind)
    for n in (m.apply(torch.tanh), (-1 * m).inverse(0.05, indefinite=True), m["2"]):
        nng.save(n, tmp_path / "m")
        again = nng.load(tmp_path / "m")
        assert type(again) is type(n) and torch.equal(again.to_dense(), n.to_dense())
        assert pickle.loads(pickle.dumps(n)).to(torch.float32).dtype == torch.float32


@pytest.mark.parametrize("kind", STORED)
def test_parameters_that_the_data_does_not_use(kind):
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    model.register_parameter("idle", nn.Parameter(torch.ones(4, dtype=f64)))
    m = nng.FIM(model, [torch.randn(5, 3, dtype=f64)], representation(kind, model), check=False)
    idle = m["idle"]
    assert idle.layer_collection.names == ("idle",)
    if kind != "eye":
        assert float(idle.norm()) == 0.0
    x = definite(m)
    close(
        m.power(0.5, x).to_dense(), function_of(m.to_dense() + x * torch.eye(m.shape[0], dtype=f64), torch.sqrt), 1e-8
    )
    if kind in EXACT_BY_PARAMETER:
        prior = vector(m).apply(lambda x: x.abs() + 0.1)
        require_damped(m, prior, prior.flat())


def test_patterns_of_mixtures_are_those_of_collections():
    case = build("transformer")
    norms = lambda n: "norm" in n
    expected = nng.FIM(case.model, case.loader, nng.PMatMixed({"*norm*": nng.PMatDiag}, default=nng.PMatKFAC))
    layers = case.model.body[0]
    for pattern in (nn.LayerNorm, norms, (layers.norm1, layers.norm2), lambda n, p: norms(n)):
        mixture = nng.PMatMixed({pattern: nng.PMatDiag}, default=nng.PMatKFAC)
        m = nng.FIM(case.model, case.loader, mixture)
        assert m.blocks.keys() == expected.blocks.keys()
        torch.testing.assert_close(m.to_dense(), expected.to_dense())
        for measure in (nng.GradientCovariance, nng.Hessian):
            kinds = nng.PMatMixed({pattern: nng.PMatDiag}, default=nng.PMatDense)
            n = measure(case.model, case.loader, kinds, loss="cross_entropy")
            close(n[nn.LayerNorm].to_dense(), n[norms].diag().flat().diag())
    nng.optim.NaturalGradient(case.model, representation=mixture)
    with pytest.raises(nng.CollectionError, match="PMatMixed"):
        nng.FIM(case.model, case.loader, nng.PMatMixed({nn.Conv2d: nng.PMatDiag}, default=nng.PMatKFAC))
    with pytest.raises(nng.ArgumentTypeError, match="expected a name"):
        nng.FIM(case.model, case.loader, nng.PMatMixed({3: nng.PMatDiag}, default=nng.PMatKFAC))
