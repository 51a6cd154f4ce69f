"""The benchmark agrees with its slow references, times, and reports; on toy settings."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import influence, peers, report, truth
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


@pytest.mark.parametrize("job", ["J5", "J6", "J7", "J8", "J9", "J11"])
def test_contenders_of_torch_func_agree_too(job):
    w = workload("W2", 4, 4 if job in ("J6", "J11") else 2, dtype=torch.float64)
    expected = truth.TRUTHS[job](w)
    for label in ("torch.func", "torch.func (tutorial)") if job == "J6" else ("torch.func",):
        run, canonical = peers.peers(job, label)[label](w)
        assert truth.disagreement(job, w, canonical(run()), expected) < 1e-6


def test_influence_agrees_with_the_version_by_hand():
    found = influence.contenders("W2", 3, 6)  # which raises where they differ
    assert [scores.shape for scores, _ in (found[k]() for k in found if k != "nngeom")] == [(3, 6), (3, 6)]


def test_what_is_not_installed_is_named(monkeypatch):
    library = {
        "nowhere": ("no_such_module", "no-such-distribution"),
        "namesake": ("json.no_such_part", "no-such-part"),
        "broken": ("json", "json"),
    }
    monkeypatch.setattr(peers, "LIBRARIES", library)
    missing = peers.missing()
    assert missing["nowhere"] == "not installed (pip install no-such-distribution)"
    assert missing["namesake"] == "not installed (pip install no-such-part)"
    assert missing["broken"].startswith("ModuleNotFoundError")
    assert peers.peers("J1") == {}


def cell(workload, job, skipped=(), **ratios):
    timed = {
        label: {"ratio": r, "ratio_q1": r, "ratio_q3": r, "median_ms": r, "min_ms": r} for label, r in ratios.items()
    }
    return {
        "workload": workload,
        "job": job,
        "floor": {"median_ms": 1.0},
        "contenders": timed,
        "skipped": dict.fromkeys(skipped, "why"),
    }


def test_cells_are_merged():
    results = {"cells": [cell("W1", "J10", nngeom=2.0), cell("W1", "J2", ["peer"], nngeom=3.0, other=5.0)]}
    whole = report.with_cell(results, cell("W1", "J2", nngeom=2.5), keep=False)["cells"]
    assert [c["job"] for c in whole] == ["J2", "J10"]
    assert set(whole[0]["contenders"]) == {"nngeom"} and not whole[0]["skipped"]
    kept = report.with_cell(results, cell("W1", "J2", ["other"], peer=4.0), keep=True)["cells"][0]
    assert set(kept["contenders"]) == {"nngeom", "peer"} and set(kept["skipped"]) == {"other"}


def test_results_of_another_machine_are_not_mixed_in(tmp_path):
    path = tmp_path / "out.json"
    path.write_text(json.dumps({"environment": {"torch": "0.1"}, "cells": []}))
    with pytest.raises(SystemExit, match="measured in"):
        main(["--json", str(path), "--threads", str(torch.get_num_threads())])


def test_tables_are_rendered_from_the_file(tmp_path, capsys):
    path, page = tmp_path / "out.json", tmp_path / "page.md"
    path.write_text(json.dumps({"environment": {}, "cells": [cell("W1", "J2", nngeom=3.0, peer=123.4)]}))
    page.write_text("<!-- table -->\n<!-- end -->\n")
    main(["--render", "--json", str(path), "--docs", str(page), "--threads", str(torch.get_num_threads())])
    assert "| 123 peer [-] |" in page.read_text() and "| J2 | W1 |" in capsys.readouterr().out
    page.write_text("no marks")
    with pytest.raises(ValueError, match="table"):
        report.into(str(page), "table", "")


def test_rounds_are_interleaved():
    calls = []
    series = interleaved(
        lambda: calls.append("floor"), {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, least=0.0
    )
    assert calls == ["a", "b", "floor"] + 2 * ["floor", "a", "b", "floor"]
    assert set(series) == {"floor", "a", "b"} and len(series["a"].ratios) == 2


def test_summary():
    summary = Series([1.0, 3.0, 2.0], [2.0, 6.0, 4.0]).summary()
    assert summary["median_ms"] == 2000 and summary["min_ms"] == 1000 and summary["ratio"] == 4


def test_command(tmp_path, capsys):
    path, figure = tmp_path / "out.json", tmp_path / "out.png"
    threads = torch.get_num_threads()
    try:
        main(
            [
                "--workload",
                "W2",
                "--job",
                "J8",
                "--repeats",
                "1",
                "--no-check",
                "--no-memory",
                "--json",
                str(path),
                "--plot",
                str(figure),
            ]
        )
    finally:
        torch.set_num_threads(threads)
    results = json.loads(path.read_text())
    assert results["environment"]["torch"] == torch.__version__
    assert results["cells"][0]["contenders"]["nngeom"]["ratio"] > 0
    assert "J8 W2" in capsys.readouterr().out and figure.stat().st_size > 1000
    assert "| J8 | W2 |" in report.markdown(results)


def test_the_device_command_goes_on_where_it_was_cut_off(tmp_path, capsys, monkeypatch):
    from benchmarks import device

    page, ran = tmp_path / "page.md", []

    def step(name):
        def run():
            ran.append(name)
            return {"contenders": {"nngeom": {"median_ms": 2.0, "ratio": 3.0, "peak_bytes": 2**20}}}

        return run

    broken = lambda: 1 / 0
    monkeypatch.setattr(device, "steps", lambda options: [("a", step("a")), ("b", broken), ("c", step("c"))])
    page.write_text("<!-- gpu -->\n<!-- end -->\n")
    command = ["--device", "cpu", "--folder", str(tmp_path)]
    device.main([*command, "--minutes", "-1"])
    assert not ran and "run the command again" in capsys.readouterr().out
    device.main([*command, "--only", "c"])
    device.main([*command, "--docs", str(page)])
    assert ran == ["c", "a"]
    text = page.read_text()
    assert "| cpu | a | 2.00 | 3 | 1 |" in text and "ZeroDivisionError" in text
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="no GPU"):
            device.main(["--folder", str(tmp_path)])


def test_a_step_of_the_device_command():
    from benchmarks import device

    found = device.timed("W2", "J8", "cpu", 1)
    assert found["contenders"]["nngeom"]["ratio"] > 0 and set(found) == {"floor", "contenders"}


@pytest.mark.parametrize(
    "row, sizes",
    [
        ("wide", {"outputs": 20, "n": 4, "width": 8}),
        ("vocabulary", {"words": 50, "n": 2, "width": 8}),
        ("recurrent", {"inputs": 3, "width": 4, "n": 4}),
        ("tiny", {}),
        ("vectors", {"width": 8}),
        ("eigenvalues", {"width": 8}),
    ],
)
def test_rows(row, sizes):
    from benchmarks import rows

    found = rows.measured(row, "cpu", 1, **sizes)
    assert all(s["ratio"] > 0 for s in found["contenders"].values())
    assert len(rows.markdown({"rows": [found]}).splitlines()) == 2 + len(found["contenders"])


def test_constants_of_sums_are_put_back():
    from benchmarks import apart

    before = {name: getattr(module, name) for name, (module, _) in apart.GRID.items()}
    lines = apart.table([4], 1).splitlines()
    assert {name: getattr(module, name) for name, (module, _) in apart.GRID.items()} == before
    assert len(lines) == 2 + sum(len(values) for _, values in apart.GRID.values())
    assert sum("(taken)" in line for line in lines) == len(before) and all(line.count("|") == 4 for line in lines[2:])


def test_constants_at_other_values_are_put_back():
    from benchmarks import constants
    from nngeom.core import factor_inverses
    from nngeom.pmat import kronecker_basis

    before, docs = (factor_inverses.CLEAR, kronecker_basis.PIECE), Path(__file__).parent.parent / "docs"
    found = constants.clears(torch.float32, 1, draws=10)
    sizes = (constants.PIECES[0], before[1])
    assert constants.pieces("72 rows, 64 x 64", 1, sizes)["ratios"].keys() == set(map(str, sizes))
    assert (factor_inverses.CLEAR, kronecker_basis.PIECE) == before
    assert before[0] in constants.CLEARS and before[1] in constants.PIECES
    assert found["differ"][str(before[0])] == 0 < found["differ"]["1.0"]
    assert all(condition > 1 > error for condition, error in found["errors"].values())
    kept = json.loads((docs / "data" / "constants.json").read_text())
    assert constants.markdown(kept) in (docs / "benchmarks.md").read_text()
