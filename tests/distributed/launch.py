"""Checks run by several processes: started once for many checks, each of which is reported by itself.

``python launch.py THEME RANK SIZE FOLDER`` is one process: it runs the checks of a theme (a module beside this one, its
functions marked by :func:`check`) in order and writes what they said to ``FOLDER``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
LIMIT = 150  # seconds a launch of two processes; more of them on a few cores take as much longer
PATIENCE = 20  # seconds a collective of two


@dataclass(frozen=True)
class Here:
    """Where a check runs: ``rank`` of ``size``, the group, and a folder that all see."""

    rank: int
    size: int
    folder: Path

    @property
    def group(self) -> Any:
        """All processes."""
        return dist.group.WORLD

    def same(self, x: torch.Tensor) -> None:
        """Whether a tensor is the same on all ranks, bit by bit."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        assert all(torch.equal(part, x) for part in parts), f"ranks differ by {max((p - x).abs().max() for p in parts)}"


Check = Callable[[Here], None]


def check(checks: dict[str, Check], name: str | None = None) -> Callable[[Check], Check]:
    """A decorator: one more check of a theme."""

    def listed(f: Check) -> Check:
        checks[name or f.__name__] = f
        return f

    return listed


def raises(kind: Any, text: str, call: Callable[[], object]) -> None:
    """``call`` raises an error of this kind, or of one of these, with this text in it."""
    try:
        call()
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"no {kind}")


# -- the processes -----------------------------------------------------------------------------------------------------


def scaled(seconds: float, size: int) -> float:
    """What two processes may take, for so many."""
    return seconds * max(1, size - 1)


def store_of(rank: int, size: int, folder: Path) -> Any:
    """A TCP store on a free port, which rank 0 writes down for the others."""
    place, patience = folder / "port", timedelta(seconds=scaled(PATIENCE, size))
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, timeout=patience, wait_for_workers=False)
        part = folder / "port.part"
        part.write_text(str(store.port))
        part.rename(place)
        return store
    while not place.exists():
        time.sleep(0.02)
    return dist.TCPStore("127.0.0.1", int(place.read_text()), size, timeout=patience, wait_for_workers=False)


def run(theme: str, rank: int, size: int, folder: Path) -> None:
    """All checks of a theme, as one of its processes."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    torch.set_num_threads(1)
    listed = importlib.import_module(theme)
    checks: dict[str, Check] = listed.CHECKS
    patience = timedelta(seconds=getattr(listed, "PATIENCE", scaled(PATIENCE, size)))
    store = store_of(rank, size, folder)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=patience)
    said: dict[str, str] = {}
    for name, f in checks.items():
        torch.manual_seed(0)
        try:
            f(Here(rank, size, folder))
            said[name] = ""
        except BaseException:
            said[name] = traceback.format_exc()
        (folder / f"said-{rank}.json.part").write_text(json.dumps(said))
        (folder / f"said-{rank}.json.part").rename(folder / f"said-{rank}.json")
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    dist.destroy_process_group()


# -- who starts them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """What the processes of a launch said of every check, and printed."""

    answers: list[dict[str, str]]
    printed: str

    def require(self, name: str, ranks: list[int] | None = None) -> None:
        """A check passed on all ``ranks``."""
        for rank in range(len(self.answers)) if ranks is None else ranks:
            answer = self.answers[rank].get(name, "it did not come to this check")
            assert not answer, f"rank {rank} of {len(self.answers)}:\n{answer}\n{self.printed[-6000:]}"


def launch(theme: str, size: int, folder: Path, limit: float | None = None) -> Said:
    """Start the processes of a theme, wait for them, and end those that are left."""
    paths = os.pathsep.join([str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    logs = [open(folder / f"log-{rank}", "w") for rank in range(size)]
    command = [sys.executable, __file__, theme]
    started = [
        subprocess.Popen([*command, str(rank), str(size), str(folder)], env=env, stdout=log, stderr=subprocess.STDOUT)
        for rank, log in enumerate(logs)
    ]
    end = time.monotonic() + (scaled(LIMIT, size) if limit is None else limit)
    try:
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, end - time.monotonic()))
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
                process.wait()
        for log in logs:
            log.close()
    files = [folder / f"said-{rank}.json" for rank in range(size)]
    answers = [json.loads(f.read_text()) if f.exists() else {} for f in files]
    return Said(answers, "\n".join((folder / f"log-{rank}").read_text() for rank in range(size)))


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
