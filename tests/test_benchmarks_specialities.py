"""Other libraries in their own speciality, and one thread against two: what is compared is the same thing."""

import pytest
import torch
from torch import nn

from benchmarks import report, specialities, threads
from benchmarks.workloads import MODELS, Workload


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    batches = [(torch.randn(n, 6), torch.randint(0, 4, (n,))) for n in (4, 4)]
    return Workload("W2", model, batches)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("job", specialities.JOBS)
def test_jobs_agree_with_the_library_that_is_made_for_them(job):
    needs = {"product": "hessian_eigenthings", "eigenvalues": "hessian_eigenthings", "kfac-jax": "kfac_jax"}
    pytest.importorskip(needs.get(job, "laplace"))
    found = specialities.measured(job, small(), 1)
    assert found["left"].keys() <= {"laplace, BackPackGGN"}
    assert len(found["contenders"]) > 2
    table = specialities.markdown({"specialities": [found]}).splitlines()
    assert len(table) == 3 and found["title"] in table[2]


@pytest.mark.filterwarnings("ignore")
def test_what_disagrees_is_not_timed(monkeypatch):
    def job(w):
        runs = {"nngeom": lambda: torch.ones(2), "wrong": lambda: torch.ones(2) + 0.01, "broken": lambda: 1 / 0}
        return "a job", runs, lambda y: y, {}

    monkeypatch.setitem(specialities.JOBS, "job", (("W2",), job))
    found = specialities.measured("job", small(), 1)
    assert found["contenders"].keys() == {"nngeom", "floor"}
    assert found["left"] == {"wrong": "differs by 1.0e-02", "broken": "ZeroDivisionError: division by zero"}
    assert "wrong: differs by 1.0e-02" in specialities.markdown({"specialities": [found]})


def test_one_thread_against_two(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "for_job", lambda name, job: small())
    before = torch.get_num_threads()
    page, file = tmp_path / "page.md", tmp_path / "threads.json"
    page.write_text("<!-- threads -->\n<!-- end -->\n")
    try:
        threads.main(
            ["--job", "J1", "J6", "--workload", "W2", "--repeats", "1", "--json", str(file), "--docs", str(page)]
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    (first, second) = report.load(str(file))["threads"]
    assert [first["job"], second["job"]] == ["J1", "J6"] and first["ratio"] > 0
    assert f"| J1 | - | {first['ratio']:.2f} | - | - |" in page.read_text() and len(MODELS) == 4


def test_what_bounds_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(threads, "for_job", lambda name, job: small())
    before = torch.get_num_threads()
    page, file = tmp_path / "page.md", tmp_path / "threads.json"
    page.write_text("<!-- threads -->\n<!-- end -->\n")
    bound, copy = "J4, its eigendecompositions", "copy of 1 MiB"
    try:
        threads.main(["--job", bound, copy, "--workload", "W1", "--repeats", "1", "--json", str(file)])
        threads.main(["--render", "--json", str(file), "--docs", str(page)])
        threads.main(["--job", "J1", "--workload", "W2", "--apart"])
    finally:
        torch.set_num_threads(before)
    first, second = (f"{r['ratio']:.2f}" for r in report.load(str(file))["threads"])
    assert f"| {bound} | {first} | - | - | - |" in page.read_text() and f"{copy} {second}" in page.read_text()
    assert "between operations" in capsys.readouterr().out


@pytest.mark.parametrize("job", list(threads.MACHINE))
def test_what_the_machine_does_by_itself(job):
    threads.MACHINE[job]()()
