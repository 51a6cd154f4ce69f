"""Interleaved timing and peak memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Series:
    """Seconds of one contender, round by round, and the ratio to the floor of the same round."""

    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Medians, quartiles and minima; a single round has no spread."""
        q = statistics.quantiles(self.ratios, n=4) if len(self.ratios) > 1 else self.ratios * 3
        return {
            "median_ms": 1e3 * statistics.median(self.seconds),
            "min_ms": 1e3 * min(self.seconds),
            "ratio": statistics.median(self.ratios),
            "ratio_q1": q[0],
            "ratio_q3": q[-1],
        }


def clock(run: Callable[[], Any], device: str, least: float = 0.0) -> float:
    """Seconds of one call; short calls are repeated for at least ``least`` seconds.

    On one thread of a CPU these are seconds of the processor, which other processes on the machine disturb least.
    """
    now = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    _synchronize(device)
    start, calls = now(), 0
    while True:
        run()
        calls += 1
        _synchronize(device)
        spent = now() - start
        if spent >= least:
            return spent / calls


def interleaved(
    floor: Callable[[], Any],
    contenders: dict[str, Callable[[], Any]],
    repeats: int,
    device: str = "cpu",
    least: float = 0.03,
) -> dict[str, Series]:
    """Rounds of floor and every contender in turn, after one round to warm up; disturbances hit all alike."""
    series = {name: Series() for name in ("floor", *contenders)}
    for run in contenders.values():
        run()
    floor()
    for _ in range(repeats):
        base = clock(floor, device, least)
        seconds = {name: clock(run, device, least) for name, run in contenders.items()}
        base = min(base, clock(floor, device, least))
        for name, spent in {"floor": base, **seconds}.items():
            series[name].seconds.append(spent)
            series[name].ratios.append(spent / base)
    return series


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_memory(run: Callable[[], Any], device: str = "cpu") -> int | None:
    """Bytes above the start that one call takes at its peak, its result included; ``None`` where it can't be
    measured.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = run()
        peak = torch.cuda.max_memory_allocated(device) - before
        del kept
        return peak
    try:
        with open("/proc/self/clear_refs", "w") as f:  # Linux: the high-water mark of this process starts anew
            f.write("5")
    except OSError:
        return None
    before = _status("VmRSS")
    kept = run()
    peak = _status("VmHWM") - before
    del kept
    return max(0, peak)


def _status(key: str) -> int:
    with open("/proc/self/status") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith(key + ":"))
