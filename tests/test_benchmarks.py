"""The benchmark agrees with its slow references, times, and reports; on toy settings."""

import json

import pytest
import torch

from benchmarks import report, truth
from benchmarks.__main__ import main
from benchmarks.ours import JOBS
from benchmarks.timing import Series, interleaved
from benchmarks.workloads import MODELS, workload

PARAMETERS = {"W1": 690_010, "W2": 61_706, "W3": 578_410, "W4": 406_154}


@pytest.mark.parametrize("name", MODELS)
def test_workloads_have_their_sizes(name):
    w = workload(name)
    assert sum(p.numel() for p in w.model.parameters()) == PARAMETERS[name]
    assert w.n == MODELS[name][2] and w.batches[0][0].shape[0] == MODELS[name][3]


@pytest.mark.parametrize("job", ["J1", "J2", "J4", "J8", "J10"])
def test_jobs_agree_with_the_slow_reference(job):
    w = workload("W2", 4, 2, dtype=torch.float64)
    expected = truth.TRUTHS[job](w)
    run, canonical = JOBS[job]["nngeom"](w)
    result = canonical(run())
    assert truth.disagreement(job, w, result, expected) < 1e-6
    assert truth.disagreement(job, w, 1.01 * result, expected) > 1e-3  # it can fail


def test_rounds_are_interleaved():
    calls = []
    series = interleaved(lambda: calls.append("floor"), {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, least=0.0)
    assert calls == ["a", "b", "floor"] + 2 * ["floor", "a", "b", "floor"]
    assert set(series) == {"floor", "a", "b"} and len(series["a"].ratios) == 2


def test_summary():
    summary = Series([1.0, 3.0, 2.0], [2.0, 6.0, 4.0]).summary()
    assert summary["median_ms"] == 2000 and summary["min_ms"] == 1000 and summary["ratio"] == 4


def test_command(tmp_path, capsys):
    path, figure = tmp_path / "out.json", tmp_path / "out.png"
    threads = torch.get_num_threads()
    try:
        main(["--workload", "W2", "--job", "J8", "--repeats", "1", "--no-check", "--no-memory", "--json", str(path), "--plot", str(figure)])
    finally:
        torch.set_num_threads(threads)
    results = json.loads(path.read_text())
    assert results["environment"]["torch"] == torch.__version__
    assert results["cells"][0]["contenders"]["nngeom"]["ratio"] > 0
    assert "J8 W2" in capsys.readouterr().out and figure.stat().st_size > 1000
    assert "| J8 | W2 |" in report.markdown(results)
