"""Checks run by several processes: started once for many checks, each of which is reported by itself.

A server, ``python launch.py``, imports what is needed once; for every launch it forks processes, which run the checks
of a theme (a module beside this one, its functions marked by :func:`check`) in order and write what they said to a
folder.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lacking import SHARDS_ON_CPU, UNSHARDED

HERE = Path(__file__).parent
LIMIT = 250  # seconds a launch of two processes; more of them on a few cores take as much longer
UNEVEN = f"fully_shard of torch {torch.__version__} cuts tensor-parallel parameters evenly only"
UNSERVED = {"has no attribute 'record_event'": UNSHARDED, "does not support uneven sharding": UNEVEN}  # torch 2.6
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
            for said, reason in UNSERVED.items():
                if said in answer and not SHARDS_ON_CPU:
                    pytest.skip(reason)
            assert not answer, f"rank {rank} of {len(self.answers)}:\n{answer}\n{self.printed[-6000:]}"


def launch(theme: str, size: int, folder: Path, limit: float | None = None) -> Said:
    """Start the processes of a theme, wait for them, and end those that are left."""
    SERVER.launch(theme, size, folder, scaled(LIMIT, size) if limit is None else limit)
    files = [folder / f"said-{rank}.json" for rank in range(size)]
    answers = [json.loads(f.read_text()) if f.exists() else {} for f in files]
    return Said(answers, "\n".join((folder / f"log-{rank}").read_text() for rank in range(size)))


class Server:
    """The process that forks others, begun when first needed."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def launch(self, theme: str, size: int, folder: Path, limit: float) -> None:
        """Fork so many processes, and wait until they have ended."""
        process = self.process = self.process or self._begin()
        assert process.stdin is not None and process.stdout is not None
        asked = {"theme": theme, "size": size, "folder": str(folder), "limit": limit, "environment": dict(os.environ)}
        print(json.dumps(asked), file=process.stdin, flush=True)
        if not process.stdout.readline():
            self.process = None
            raise RuntimeError(f"the process that forks others ended, {process.wait()}")

    def _begin(self) -> subprocess.Popen[str]:
        paths = os.pathsep.join([str(HERE.parent.parent), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        command = [sys.executable, __file__]
        process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(process.communicate)
        return process


SERVER = Server()


# -- the server --------------------------------------------------------------------------------------------------------


def serve() -> None:
    """Fork the processes of launches as they are asked for, one launch after the other."""
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    torch.set_num_threads(1)
    for line in sys.stdin:
        forked(**json.loads(line))
        print("ended", flush=True)


def forked(theme: str, size: int, folder: str, limit: float, environment: dict[str, str]) -> None:
    """The processes of a launch, from their start to their end."""
    with contextlib.suppress(Exception):  # which each of them says
        importlib.import_module(theme)
    left = [begun(theme, rank, size, Path(folder), environment) for rank in range(size)]
    end = time.monotonic() + limit
    while left and time.monotonic() < end:
        left = [process for process in left if not os.waitpid(process, os.WNOHANG)[0]]
        time.sleep(0.02)
    for process in left:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def begun(theme: str, rank: int, size: int, folder: Path, environment: dict[str, str]) -> int:
    """One process, which prints to a file of the folder."""
    process = os.fork()
    if process:
        return process
    try:
        os.dup2(os.open(folder / f"log-{rank}", os.O_WRONLY | os.O_CREAT), 1)
        os.dup2(1, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ |= {name: x for name, x in environment.items() if name != "OMP_NUM_THREADS"}
        torch.set_num_threads(1)  # a forked torch makes its pool anew, and ends where several threads are first to ask
        run(theme, rank, size, folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    serve()
