"""Headless Chromium on a page: what a script that is put at its end found out, and what the browser complained of."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path
from typing import Any

import pytest

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
QUIET += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]


def visit(page: Path, script: str, width: int = 1440) -> dict[str, Any]:
    """Open a copy of a page, run ``script`` in it, an async function body that returns an object, and give that back.

    With it come ``console``, what went to the console, which tells refused requests too, and ``requests``, the
    addresses that the page loaded something from.
    """
    if BROWSER is None:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        end = f"<script>(async () => {{{script}}})().catch((e) => ({{thrown: String(e && e.stack || e)}}))"
        end += ".then((found) => { found.requests = performance.getEntriesByType('resource').map((e) => e.name);"
        end += " document.body.dataset.found = JSON.stringify(found); });</script></body>"
        copy.write_text(page.read_text().replace("</body>", end), encoding="utf-8")
        command = [BROWSER, *QUIET, f"--user-data-dir={folder}/profile", f"--window-size={width},1000"]
        command += ["--virtual-time-budget=8000", "--dump-dom", copy.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        found = re.search(r'data-found="(.*?)"', done.stdout, re.S)
        assert found, done.stdout[-2000:] + done.stderr[-2000:]
    result = json.loads(unescape(found[1]))
    result["console"] = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return result
