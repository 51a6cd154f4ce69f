"""The report of what the engine sees."""

import torch
from cases import build

import nngeom as nng


def test_explain_names_operations_structures_and_costs():
    c = build("decoder")
    report = nng.explain(c.model, c.loader[0])
    assert report["tokens.weight"].structure == "tied" and set(report["tokens.weight"].operations) == {
        "embedding",
        "linear",
    }
    assert report["positions.weight"].structure == "lookup"
    assert report["norm.weight"].structure == "exact" and report["norm.weight"].block == (3, 1, 2)
    assert "Dense block" in str(report) and "tokens.weight" in str(report)
    gru = nng.explain(build("gru").model, build("gru").loader[0])
    assert gru["cell.weight_ih_l0"].structure == "fallback" and "one backward pass" in str(gru)
    assert gru["head.weight"].structure == "kronecker"


def test_the_numbers_are_those_held():
    for name in ("mlp", "conv2d", "residual", "embedding"):
        c = build(name)
        report = nng.explain(c.model, c.loader[0])
        for kind, r in (("Diag", nng.PMatDiag), ("QuasiDiag", nng.PMatQuasiDiag), ("KFAC", nng.PMatKFAC)):
            m = nng.FIM(c.model, c.loader, r)
            seen, total = set(), 0
            for row in report.rows:
                block = next(lay for lay in nng.FIM(c.model, c.loader, nng.PMatKFAC).blocks if row.name in lay.names)
                if block not in seen:
                    seen.add(block)
                    total += row.numbers[kind]
            trivial = sum(b.g.numel() for b in m.blocks.values() if b.g.shape[-1] == 1) if kind == "KFAC" else 0
            assert m.nbytes() == 8 * (total + trivial)


def test_unused_parameters_are_reported():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    report = nng.explain(Model(), torch.randn(3, 2))
    assert report["unused.weight"].structure == "unused"
