"""C-scores estimated by resampling: how often small models that never saw an example get it right."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nngeom.analysis.labels import require_class_labels
from nngeom.core.errors import ArgumentError, FileError
from nngeom.core.given_plainly import require_real_tensor, require_whole

Learner = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # (inputs, labels, held-out inputs, seed) -> predictions (m,)


@dataclass(frozen=True)
class CScores:
    """``score (n,)`` in [0, 1], the mean over subset sizes; ``by_size (sizes, n)``; ``held_out (sizes, n)`` counts of
    models.

    An example that no model of a size held out has NaN there and counts with the other sizes.
    """

    score: Tensor
    by_size: Tensor
    held_out: Tensor
    sizes: tuple[int, ...]


def c_scores(
    inputs: Tensor,
    labels: Tensor,
    sizes: Sequence[int],
    repeats: int = 20,
    *,
    learner: Learner | None = None,
    seed: int = 0,
    workers: int = 1,
    path: str | os.PathLike | None = None,
) -> CScores:
    """For each size ``s`` of a subset in ``sizes``: the share of ``repeats`` models, trained on ``s`` random examples
    other than ``x``, that predict ``y``.

    ``inputs (n, ...)`` with class ``labels (n,)``. ``learner(inputs, labels, held_out_inputs, seed)`` returns predicted
    labels; by default ridge regression on one-hot labels. ``workers > 1`` spreads models over processes (the learner
    must be importable, and a script needs its ``if __name__ == "__main__"``); results do not depend on it. ``path``: a
    ``.npz`` that keeps finished models, so that an interrupted estimate goes on where it stopped.

    Raises :class:`ArgumentError`, and :class:`FileError` for a file of other data or settings. Source: Jiang et al.
    2021; George 2023, thesis, eq. 5.3.2.
    """
    require_real_tensor(inputs, "inputs")
    n = len(inputs)
    for number, what in (*((s, "a size") for s in sizes), (repeats, "repeats"), (workers, "workers")):
        require_whole(number, what)
    if labels.shape != (n,):
        raise ArgumentError(f"labels have shape {tuple(labels.shape)}; expected ({n},), one an input")
    if not sizes or not all(s < n for s in sizes):
        raise ArgumentError(f"sizes={list(sizes)}; expected sizes in [1, {n - 1}], at least one")
    jobs = [(i, s, r) for i, s in enumerate(sizes) for r in range(repeats)]
    key = _fingerprint(inputs, labels, sizes, seed, learner)
    right, done = _read(path, key) if path is not None and os.path.exists(path) else ({}, set())
    todo = [job for job in jobs if job not in done]
    one = partial(_one, inputs.flatten(1) if learner is None else inputs, labels, learner or ridge, seed)
    pool = (
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) if workers > 1 and todo else None
    )
    try:
        for count, (job, outcome) in enumerate((pool.map if pool else map)(one, todo)):
            right[job] = outcome
            if path is not None and (count % 20 == 19 or count == len(todo) - 1):
                _write(path, key, right)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    table = torch.stack([torch.as_tensor(right[job]) for job in jobs]).view(len(sizes), repeats, n)
    held_out = (table >= 0).sum(1)
    by_size = (table == 1).sum(1) / held_out  # 0 / 0 is NaN
    return CScores(by_size.nanmean(0), by_size, held_out, tuple(sizes))


def ridge(inputs: Tensor, labels: Tensor, held_out: Tensor, seed: int = 0, strength: float = 1e-2) -> Tensor:
    """Predictions of ridge regression on one-hot labels, ``strength`` relative to the mean squared norm of the
    inputs.
    """
    y = require_class_labels(labels, len(inputs), "ridge regression on labels")
    if int(y.min()) < 0:
        raise ArgumentError(f"labels go from {int(y.min())} to {int(y.max())}; expected classes from 0 on")
    x = inputs.flatten(1).double()
    mean = x.mean(0)
    x, targets = x - mean, torch.nn.functional.one_hot(y, int(y.max()) + 1).double()
    bias = targets.mean(0)
    k = x @ x.T
    ridge = strength * k.diagonal().mean().clamp_min(1e-12) * len(x) ** 0.5
    dual = torch.linalg.solve(k + ridge * torch.eye(len(x), dtype=k.dtype, device=k.device), targets - bias)
    return ((held_out.flatten(1).double() - mean) @ x.T @ dual + bias).argmax(1)


def _one(
    inputs: Tensor, labels: Tensor, learner: Learner, seed: int, job: tuple[int, int, int]
) -> tuple[tuple[int, int, int], np.ndarray]:
    """One model: ``(n,)`` of 1 (right), 0 (wrong), -1 (in its training set)."""
    i, size, r = job
    torch.set_num_threads(1)
    own = int(np.random.SeedSequence([seed, i, size, r]).generate_state(1)[0])
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(own)).to(labels.device)
    chosen, rest = order[:size], order[size:]
    predictions = learner(inputs[chosen], labels[chosen], inputs[rest], own)
    if not isinstance(predictions, Tensor) or predictions.shape != rest.shape:
        given = tuple(predictions.shape) if isinstance(predictions, Tensor) else type(predictions).__name__
        raise ArgumentError(f"the learner returned {given} for {len(rest)} held-out inputs; expected a label for each")
    outcome = torch.full((len(inputs),), -1, dtype=torch.int8)
    outcome[rest.cpu()] = (predictions.to(labels.device) == labels[rest]).to(torch.int8).cpu()
    return job, outcome.numpy()


def _fingerprint(inputs: Tensor, labels: Tensor, sizes: Sequence[int], seed: int, learner: Any) -> str:
    digest = hashlib.sha256(
        repr(
            (
                tuple(inputs.shape),
                list(sizes),
                seed,
                getattr(learner, "__qualname__", repr(learner) if learner else None),
            )
        ).encode()
    )
    for t in (inputs, labels):
        digest.update(t.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Any, key: str) -> tuple[dict, set]:
    try:
        with np.load(path, allow_pickle=False) as file:
            given, jobs, table = str(file["key"]), file["jobs"], file["right"]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise FileError(
            f"{os.fspath(path)} is not a file of C-scores ({error}); expected one written here: delete it or "
            "pass another path"
        ) from error
    if given != key:
        raise FileError(
            f"{os.fspath(path)} holds C-scores of other data, sizes, seed or learner; delete it or pass another path"
        )
    right = {tuple(int(x) for x in job): row for job, row in zip(jobs, table)}
    return right, set(right)


def _write(path: Any, key: str, right: dict) -> None:
    temporary = f"{os.fspath(path)}.tmp"
    with open(temporary, "wb") as file:
        np.savez_compressed(file, key=np.array(key), jobs=np.array(list(right)), right=np.stack(list(right.values())))
    os.replace(temporary, path)
