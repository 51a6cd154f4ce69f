"""What a process has of models and matrices in parts is measured, and the page shows it."""

import pytest
import torch
import torch.distributed as dist
from lacking import shards_on_cpu

from benchmarks import in_parts, report


@pytest.fixture
def alone():
    if dist.is_initialized():
        pytest.skip("a group of another test is open")
    threads = torch.get_num_threads()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()
    torch.set_num_threads(threads)


@shards_on_cpu
@pytest.mark.filterwarnings("ignore:memory_budget")
def test_a_run_in_one_process(alone, monkeypatch, tmp_path, capsys):
    found = in_parts.process(6, 2, 8)
    assert [(r["kind"], r["way"]) for r in found["rows"]] == [(k, w) for k in in_parts.KINDS for w in in_parts.WAYS]
    parameters, factors = 2 * (36 + 6) + 24 + 4, 3 * 49 + 2 * 36 + 16
    assert {r["parameters"] * 2**20 for r in found["rows"]} == {4 * parameters}
    assert {r["kept"] * 2**20 for r in found["rows"]} == {4 * factors} and all(
        r["kilobytes"] == 0 for r in found["rows"]
    )
    monkeypatch.setattr(in_parts, "launched", lambda size, options: {**found, "ranks": size})
    page = tmp_path / "page.md"
    page.write_text("<!-- in parts -->\n<!-- end -->\n")
    in_parts.main(["--processes", "2", "4", "--json", str(tmp_path / "out.json"), "--docs", str(page)])
    assert f"| PMatKFAC | 4 | gathered | {factors / parameters:.2f} |" in page.read_text()
    assert "in parts, streamed" in capsys.readouterr().out


def test_the_page_shows_the_file(request):
    docs = request.config.rootpath / "docs"
    runs = report.load(str(docs / "data" / "in_parts.json"))["runs"]
    assert in_parts.table(runs) in (docs / "distributed.md").read_text()
