"""The model of communication is its formulas, and a tiny run in one process counts, measures and reports."""

import json
import math
import types

import pytest
import torch
import torch.distributed as dist

from benchmarks import communication, distributed, report
from benchmarks.communication import Constants, fitted, loads, model, predicted, sent

AT = Constants(node=4, inside=100.0, inside_latency=1.0, between=10.0, between_latency=2.0, eigh_start=0.5)


def test_messages_take_latency_and_bandwidth():
    assert [AT.all_reduce(size, 1000.0) for size in (1, 4, 8)] == [0, 2 * 2 + 1.5 * 10, 2 * 2 * 3 + 2 * 7 / 8 * 100]
    assert [AT.half(size, 1000.0) for size in (1, 4, 8)] == [0, 2 + 0.75 * 10, 2 * 3 + 7 / 8 * 100]
    assert AT.broadcasts(4, 1000.0) == 4 * 2 + 0.75 * 10 and AT.broadcasts(1, 1000.0) == 0
    assert AT.half(3, 0.0) == 2  # steps are whole


def test_a_decomposition_takes_a_power_of_its_side():
    at = Constants(eigh_start=1.0, eigh_side=10, eigh_seconds=2.0, eigh_power=3)
    assert at.eigh(20) == 1 + 2 * 8


def test_loads_are_those_of_the_library():
    from nngeom.ranks.made import assigned

    costs = dict(enumerate((5.0, 3.0, 3.0, 2.0, 2.0, 1.0)))
    owners = assigned(costs, 3)
    assert loads(costs.values(), 3) == [sum(costs[k] for k in costs if owners[k] == rank) for rank in range(3)]


def test_sizes_of_the_nets():
    volumes = {net: communication.volumes(layers) for net, layers in communication.NETS.items()}
    assert [round(v["gradient"] / 4e6, 1) for v in volumes.values()] == [25.5, 85.0, 6476.0]
    assert len(communication.NETS["ResNet-50"]) == 54
    assert [round(v["factors"] / 1e6) for v in volumes.values()] == [615, 1303, 70154]
    assert all(v["strips"] == 0.5625 * v["factors"] for v in volumes.values())


def test_what_is_predicted_of_two_layers():
    at = Constants(4, 100.0, 1.0, 10.0, 2.0, eigh_start=0.0, eigh_side=1, eigh_seconds=1.0, eigh_power=3)
    found = predicted([(2, 1), (3, 1)], 2, at)  # sides of 8, 1, 27, 1 seconds; 60 bytes of factors
    merge = 2 + 0.5625 * 60 / 100
    assert found == pytest.approx({
        "merge": merge,
        "replicated": merge + 37,
        "assigned": merge + 27 + (1 + 0.3) + 1,
        "imbalance": 27 / 18.5,
        "bases": 60 + 20,
        "owned": merge / 2 + 28,
        "owned_bases": 4 * (9 + 1 + 3),
        "step": 1 + 10 / 100,
        "gradient": 2 + 20 / 100,
        "every_batch": 1000 * (2 + 60 / 100),
    })  # fmt: skip


def test_one_process_sends_nothing():
    alone = predicted([(2, 1), (3, 1)], 1, Constants())
    assert alone["merge"] == alone["step"] == alone["every_batch"] == 0
    assert alone["assigned"] == alone["replicated"] == pytest.approx(alone["owned"])


def test_constants_are_replaced_everywhere():
    rows = model((8, 64), {"inside": 1e9, "eigh_seconds": 7.0})
    assert {(row["ranks"], row["network"]) for row in rows} == {(8, "fast"), (64, "fast"), (64, "slow")}
    assert rows[0]["replicated"] > 7 * sum((s / 4096) ** 2.7 for layer in communication.resnet50() for s in layer)
    strips = communication.volumes(communication.NETS["ResNet-50"])["strips"]
    assert rows[0]["merge"] == pytest.approx(2 * 3 * 3e-6 + 2 * 7 / 8 * strips / 1e9)
    for wrong in ({"inside": 0.0}, {"between_latency": -1.0}, {"eigh_seconds": math.nan}, {"eigh_seconds": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model((8,), wrong)
    with pytest.raises(TypeError, match="bandwidth"):
        model((8,), {"bandwidth": 1.0})


def test_constants_are_fitted():
    at = Constants(inside=5e8, inside_latency=2e-4)
    found = fitted(4, {nbytes: at.all_reduce(4, nbytes) for nbytes in (10**3, 10**7)})
    assert found == pytest.approx({"inside": 5e8, "inside_latency": 2e-4})
    with pytest.raises(ValueError, match="measure again"):
        fitted(4, {10: 1.0, 100: 1.0})


@pytest.fixture
def alone():
    if dist.is_initialized():
        pytest.skip("a group of another test is open")
    threads = torch.get_num_threads()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


def test_a_run_in_one_process(alone, monkeypatch, tmp_path, capsys):
    with distributed.counted() as (calls, nbytes):
        t = torch.ones(6)
        dist.all_reduce(t)
        dist.broadcast(t, 0)
        dist.all_gather([torch.empty(2)], torch.ones(2))
    assert calls == {"all_reduce": 1, "broadcast": 1, "all_gather": 1}
    assert nbytes == {"all_reduce": 24, "broadcast": 24, "all_gather": 8}
    assert [sent(kind, 4, n) for kind, n in nbytes.items()] == [36, 18, 24]
    found = distributed.process(8, 4, 1)
    assert len(found["jobs"]) == 9 and found["constants"]["eigh_seconds"] > 0
    for row in found["jobs"].values():
        assert row["seconds"] > 0 and row["messages"] == row["kilobytes"] == 0  # one process tells nobody
    monkeypatch.setattr(distributed, "launched", lambda size, *of: {**found, "ranks": size})
    path, page = tmp_path / "out.json", tmp_path / "page.md"
    page.write_text("<!-- processes -->\n<!-- end -->\n<!-- model -->\n<!-- end -->\n")
    options = ["--json", str(path), "--docs", str(page), "--model", "16"]
    distributed.main(["--processes", "1", "--constants", "node=2", *options])
    assert "| FIM, PMatKFAC | 1 | 1.00 |" in page.read_text() and "eigh_seconds=" in capsys.readouterr().out
    before = page.read_text()
    distributed.main(["--processes", "--constants", "node=16", *options])  # runs stay
    assert page.read_text().count("16 | slow") == 0 < before.count("16 | slow")
    assert json.loads(path.read_text())["runs"][0]["jobs"].keys() == found["jobs"].keys()


def test_processes_that_fail_are_told(monkeypatch):
    failed = types.SimpleNamespace(wait=lambda *limit: 3)
    monkeypatch.setattr(distributed.subprocess, "Popen", lambda *of, **options: failed)
    with pytest.raises(RuntimeError, match="2 processes ended with 3"):
        distributed.launched(2, 8, 4, 1)


def test_the_page_shows_the_file(request):
    docs = request.config.rootpath / "docs"
    results = report.load(str(docs / "data" / "distributed.json"))
    page = (docs / "distributed.md").read_text()
    assert distributed.table_of_runs(results["runs"]) in page and distributed.table_of_model(results["model"]) in page
    for shown, now in zip(results["model"], model(), strict=True):
        assert shown == pytest.approx(now)
