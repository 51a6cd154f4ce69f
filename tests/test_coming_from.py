"""Pages for those who come from another library: every pair of there and here runs, and its numbers agree."""

import logging
from pathlib import Path

import pytest
import torch
from test_docs import PEERS, blocks

MODULES = {"neural_tangents": None}  # what is here alone runs
LOGGERS = ("kronfluence",)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", sorted(p for p in PEERS if p.stem != "index"), ids=lambda p: p.stem)
def test_pairs_agree(page: Path, tmp_path, monkeypatch):
    module = MODULES.get(page.stem, page.stem)
    if module is not None:
        pytest.importorskip(module, reason=f"{module} is not installed")
    monkeypatch.chdir(tmp_path)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    namespace = {"__name__": f"coming_from_{page.stem}"}
    try:
        for block in blocks(page):
            exec(compile(block, str(page), "exec"), namespace)
    finally:
        torch.set_default_dtype(torch.float32)


def test_every_page_compares():
    """A page that asserts nothing compares nothing."""
    for page in PEERS:
        if page.stem != "index":
            assert "assert" in "".join(blocks(page)), page.stem
