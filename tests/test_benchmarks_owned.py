"""What each process keeps is measured, and the page shows it."""

import pytest
import torch
import torch.distributed as dist

from benchmarks import owned, report


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
    found = owned.process(4, 2, 8)
    assert [(r["kind"], r["placement"]) for r in found["rows"]] == [
        (kind, how) for kind in ("KFAC", "EKFAC") for how in ("replicated", "owned")
    ]
    factors = 2 * 4 * (5**2 + 4**2)  # bytes of one of averages and inverses
    assert found["rows"][0]["kept"] == pytest.approx(2 * factors / 2**20) == found["rows"][1]["kept"]
    assert all(r["without"] == r["with bases"] == 0 for r in found["rows"])  # one process tells nobody
    monkeypatch.setattr(owned, "launched", lambda size, options: {**found, "ranks": size})
    page = tmp_path / "page.md"
    page.write_text("<!-- owned -->\n<!-- end -->\n")
    owned.main(["--processes", "1", "2", "--json", str(tmp_path / "out.json"), "--docs", str(page)])
    assert "| KFAC | 2 | owned | 1.00 |" in page.read_text() and "EKFAC" in capsys.readouterr().out


def test_the_page_shows_the_file(request):
    docs = request.config.rootpath / "docs"
    assert owned.table(report.load(str(docs / "data" / "owned.json"))["runs"]) in (docs / "distributed.md").read_text()
