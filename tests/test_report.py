"""Accuracy tables: every column against its formula on dense matrices."""

import csv

import pytest
import torch
from cases import STORED, build, representation

import nngeom as nng


@pytest.fixture(scope="module")
def matrices():
    case = build("mlp")
    return {name: nng.FIM(case.model, case.loader, representation(name, case.model)) for name in STORED}


def test_every_column_against_its_formula(matrices):
    dampings = (0.01, 0.1)
    table = nng.approximation_report(matrices, matrices["dense"], dampings=dampings, draws=3, seed=4)
    f, m = matrices["dense"].to_dense(), matrices["kfac"].to_dense()
    d = len(f)
    v = torch.randn(3, d, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    v = v / v.norm(dim=1, keepdim=True)
    cos = torch.nn.functional.cosine_similarity
    expected = {
        "trace": (m.trace() - f.trace()).abs() / f.trace(),
        "quadratic": (((v @ m) * v).sum(1) / ((v @ f) * v).sum(1) - 1).abs(),
        "forward cos": cos(v @ f, v @ m),
        "forward residual": (v @ f - v @ m).norm(dim=1) / (v @ f).norm(dim=1),
        "frobenius": (m - f).norm() / f.norm(),
    }
    for x in dampings:
        eye = x * torch.eye(d, dtype=torch.float64)
        u = torch.linalg.solve(m + eye, (f + eye) @ v.T).T
        expected[f"solve cos {x}"] = cos(v, u)
        expected[f"solve residual {x}"] = (v - u).norm(dim=1) / u.norm(dim=1)
    assert set(table.columns) == set(expected)
    for column, value in expected.items():
        assert table["kfac", column] == pytest.approx(float(value.mean()), rel=1e-8)
    errors = dict(zip(table.columns, table.standard_errors[table.rows.index("kfac")].tolist()))
    assert errors["quadratic"] == pytest.approx(float(expected["quadratic"].std() / 3**0.5)) and errors["trace"] == 0
    assert table["dense", "frobenius"] == 0 and table["dense", "forward cos"] == pytest.approx(1)
    assert table["ekfac", "trace"] < 1e-12 < table["kfac", "trace"]


def test_one_matrix_default_dampings_and_seed(matrices):
    first, again, other = (nng.approximation_report(matrices["kfac"], matrices["dense"], seed=s) for s in (0, 0, 1))
    assert (
        first.rows == ("PMatKFAC",)
        and torch.equal(first.values, again.values)
        and not torch.equal(first.values, other.values)
    )
    assert sum(c.startswith("solve cos") for c in first.columns) == 4


def test_text_csv_and_dict(matrices, tmp_path):
    table = nng.approximation_report(matrices, matrices["dense"], dampings=[0.0, 0.5], dense_limit=3)
    assert table.to_dict()["kfac"]["trace"] == table["kfac", "trace"]
    text = str(table).splitlines()
    assert len({len(line) for line in text}) == 1 and text[0].split()[0] == "trace"
    assert text[-1].endswith(" -")  # no dense matrices above the limit
    lines = dict(zip(matrices, text[2:]))
    assert all(line.startswith(name) for name, line in lines.items())
    assert " - " in lines["dense"]  # the Fisher matrix is singular without damping
    table.to_csv(tmp_path / "table.csv")
    with open(tmp_path / "table.csv", newline="") as file:
        lines = list(csv.reader(file))
    assert lines[0][1:] == [*table.columns, *(f"{c} (standard error)" for c in table.columns)]
    assert float(lines[1 + table.rows.index("kfac")][1]) == table["kfac", "trace"]
    with pytest.raises(nng.FileError, match="cannot write"):
        table.to_csv(tmp_path / "nowhere" / "table.csv")


def test_implicit_reference(matrices):
    case = build("mlp")
    implicit = nng.FIM(case.model, case.loader, nng.PMatImplicit)
    a, b = (nng.approximation_report(matrices["kfac"], r, dampings=[0.1]) for r in (implicit, matrices["dense"]))
    torch.testing.assert_close(a.values, b.values)


def test_the_columns_of_a_large_implicit_reference_are_not_formed(matrices, monkeypatch):
    case = build("mlp")
    implicit = nng.FIM(case.model, case.loader, nng.PMatImplicit)
    monkeypatch.setattr("nngeom.views.approximation.IMPLICIT_LIMIT", 10)
    table = nng.approximation_report(matrices["kfac"], implicit, dampings=[0.1])
    assert (
        str(table).endswith(" -")
        and nng.approximation_report(matrices["kfac"], implicit, dampings=[0.1], dense_limit=50)[
            "PMatKFAC", "frobenius"
        ]
        > 0
    )


def test_refusals(matrices):
    other = nng.PMatEye.build(nng.LayerCollection.from_model(torch.nn.Linear(2, 2)))
    with pytest.raises(nng.CollectionError, match="'PMatEye'"):
        nng.approximation_report(other, matrices["dense"])
    with pytest.raises(nng.ArgumentError, match="at least one"):
        nng.approximation_report({}, matrices["dense"])
    with pytest.raises(nng.ArgumentTypeError, match="expected a parameter-space matrix"):
        nng.approximation_report({"x": 3}, matrices["dense"])
    with pytest.raises(nng.ArgumentError, match="numbers here"):
        nng.approximation_report(matrices["kfac"], matrices["dense"], dampings=[nng.Cutoff(0.1)])
    table = nng.approximation_report(matrices["kfac"], matrices["dense"])
    with pytest.raises(nng.ArgumentError, match="no 'x' in this table"):
        table["x", "trace"]
