"""The two larger nets, very small: every job runs and is what autograd says; a job in a process of its own; its
limit.
"""

import json

import pytest
import torch

import nngeom as nng
from benchmarks import folder
from benchmarks.large import JOBS, SAMPLES, build, main, markdown, measured
from benchmarks.large_models import Decoder, resnet

CASES = [(model, job) for model, jobs in JOBS.items() for job in jobs]


def rows(large):
    """``(n, outputs, d)``, every output of every example by itself, in float64."""
    parameters = list(large.model.parameters())
    found = []
    for x in torch.cat([x for x, _ in large.batches]):
        outputs = large.model(x[None])[0].flatten()
        grads = [torch.autograd.grad(f, parameters, retain_graph=True, materialize_grads=True) for f in outputs]
        found.append(torch.stack([torch.cat([g.flatten() for g in gs]) for gs in grads]))
    return torch.stack(found)


def test_sizes():
    with torch.device("meta"):
        decoder = Decoder()
    assert sum(p.numel() for p in decoder.parameters()) == 124_439_808
    net = resnet()
    assert sum(p.numel() for p in net.parameters()) == 23_917_832
    assert not any(m.training for m in net.modules())


@pytest.mark.parametrize("model, job", CASES)
def test_every_job_runs(model, job):
    record = measured(model, job, 4, 2, "cpu", toy=True)
    assert record["examples"] == 4 and record["floors"] > 0 and record["seconds"] > 0
    assert record["value"] > 0 and torch.tensor(record["value"]).isfinite()
    assert record["peak_bytes"] is None or record["peak_bytes"] >= 0


def test_traces_of_the_ntk():
    resnet50, gpt2 = (build(model, 2, 2, toy=True, dtype=torch.float64) for model in ("resnet50", "gpt2"))
    assert resnet50.batches[0][0].dtype == torch.float64
    exact = rows(resnet50).square().sum()
    torch.testing.assert_close(JOBS["resnet50"]["ntk-trace"].prepare(resnet50)().trace(), exact)
    estimate = JOBS["gpt2"]["mgs-trace"].prepare(gpt2)()
    exact = rows(gpt2).square().sum()
    assert abs(estimate.value - exact) < 6 * estimate.standard_error < exact


def test_kernels_of_the_images():
    large = build("lenet", 3, 2, toy=True, dtype=torch.float64)
    exact = rows(large)
    trace = exact.square().sum()
    torch.testing.assert_close(JOBS["lenet"]["ntk-file"].prepare(large)(), trace)
    kernel = torch.einsum("ncd,mkd->ncmk", exact, exact).reshape(30, 30)
    found = JOBS["lenet"]["ntk-top"].prepare(large)()
    torch.testing.assert_close(found[0], trace)
    top = torch.linalg.eigvalsh(kernel).flip(0)[: len(found) - 1]
    torch.testing.assert_close(found[1:], top, rtol=1e-5, atol=1e-6 * float(trace))


def test_fisher_vector():
    large = build("resnet50", 3, 2, toy=True, dtype=torch.float64)
    j = rows(large)
    p = large.model(torch.cat([x for x, _ in large.batches])).softmax(-1)
    v = (
        nng.PVector.randn(nng.LayerCollection.from_model(large.model), generator=torch.Generator().manual_seed(7))
        .flat()
        .double()
    )
    moved = j @ (v / v.norm())
    expected = torch.einsum("ncd,nc->d", j, p * moved - p * (p * moved).sum(-1, keepdim=True)) / 3
    torch.testing.assert_close(JOBS["resnet50"]["fvp"].prepare(large)().flat(), expected, rtol=1e-5, atol=1e-8)


def test_ekfac_keeps_the_trace():
    large = build("resnet50", 4, 2, toy=True, dtype=torch.float64)
    ekfac, diagonal = (large.monte_carlo(kind, SAMPLES) for kind in (nng.PMatEKFAC, nng.PMatDiag))
    torch.testing.assert_close(ekfac.trace(), diagonal.trace())


def test_the_vocabulary_side_is_kept_diagonal():
    large = build("gpt2", 2, 2, toy=True)
    m = large.monte_carlo(nng.PMatKFAC.options(factor_limit=49), 1)  # the toy has 50 tokens, and widths of 16 to 48
    block = next(b for layout, b in m.blocks.items() if "tokens.weight" in layout.names)
    assert sorted(f.ndim for f in (block.a, block.g)) == [2, 3]


def test_command(tmp_path, capsys):
    path, page = tmp_path / "large.json", tmp_path / "page.md"
    page.write_text("before\n<!-- large -->\nold\n<!-- end -->\nafter\n")
    small = ["--toy", "--examples", "2", "--batch", "2", "--json", str(path)]
    main(["--model", "gpt2", "--job", "diag", *small])
    main(["--model", "resnet50", "--job", "fvp", *small, "--docs", str(page)])
    jobs = json.loads(path.read_text())["jobs"]
    assert [r["job"] for r in jobs] == ["fvp", "diag"] and jobs[0]["environment"]["torch"] == torch.__version__
    assert page.read_text() == f"before\n<!-- large -->\n{markdown({'jobs': jobs})}\n<!-- end -->\nafter\n"
    assert "gpt2 diag" in capsys.readouterr().out


def test_a_job_past_its_limit_says_so():
    with pytest.raises(RuntimeError, match="gpt2 diag ended with"):
        main(["--model", "gpt2", "--job", "diag", "--toy", "--limit-gib", "0.5"])


@pytest.mark.filterwarnings("ignore::nngeom.MemoryWarning")
def test_a_matrix_in_a_folder(capsys):
    """In memory and by parts scores are the same, which the command makes sure of."""
    folder.main(["--toy", "--whole", "--budget-gib", "0.0001"])
    printed = capsys.readouterr().out
    assert "EKFAC to a folder, 6 parts" in printed and "influence, in memory" in printed and "for 12 blocks" in printed
