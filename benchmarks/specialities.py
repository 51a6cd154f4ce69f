"""``python -m benchmarks.specialities``: other libraries in what they are made for, beside this one, in turn.

laplace-torch: the fit of a posterior with its own backends and with :class:`NNGeomGGN` in their place;
hessian-eigenthings: a product with the Hessian and its five largest eigenvalues; kfac-jax: its estimate of Kronecker
factors, compiled. What disagrees is not timed; what is missing or fails is named. ``--json FILE`` keeps the results,
other rows of the file stay; ``--docs PAGE`` writes the table between its marks.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import nngeom as nng
from benchmarks import report
from benchmarks.timing import interleaved
from benchmarks.workloads import Workload, workload

Run = Callable[[], Any]
Job = tuple[str, dict[str, Run], Callable[[Any], Tensor], dict[str, Run]]  # title, contenders, numbers, other floors
CLOSE = 1e-3


def _posterior(structure: str) -> Callable[[Workload], Job]:
    def job(w: Workload) -> Job:
        from laplace import Laplace
        from laplace.curvature import BackPackGGN, CurvlinopsGGN

        from nngeom.interop.laplace import NNGeomGGN

        def fit(model: nn.Module, backend: Any) -> Any:
            posterior = Laplace(model, "classification", "all", structure, backend=backend)
            posterior.fit(_Loader(w))
            return posterior.H

        kinds = {"nngeom": NNGeomGGN, "laplace, CurvlinopsGGN": CurvlinopsGGN, "laplace, BackPackGGN": BackPackGGN}
        models = {name: copy.deepcopy(w.model) for name in kinds}  # a backend may leave hooks
        runs = {name: (lambda name=name: fit(models[name], kinds[name])) for name in kinds}
        return f"laplace-torch: fit of a {structure} posterior", runs, _diagonal_of_a_fit, {}

    return job


class _Loader(list):  # type: ignore[type-arg]
    """Batches with the length of the data, which laplace asks of ``loader.dataset``."""

    def __init__(self, w: Workload):
        super().__init__(w.batches)
        self.dataset = range(w.n)


def _diagonal_of_a_fit(h: Any) -> Tensor:
    return h if isinstance(h, Tensor) else h.diag()


def product(w: Workload) -> Job:
    """One product with the Hessian of the mean loss."""
    v = w.vector()
    ours, theirs = _hessians(w)
    x = nng.PVector.from_flat(ours.layer_collection, v)
    runs: dict[str, Run] = {
        "nngeom": lambda: ours.mv(x).flat(),
        "hessian-eigenthings": lambda: theirs.matvec(v),
    }
    return "hessian-eigenthings: a product with the Hessian", runs, lambda y: y.detach(), {}


def largest(w: Workload) -> Job:
    """The five largest eigenvalues of the Hessian; the other library takes as many steps as it is told: as few tens as
    converge.
    """
    from hessian_eigenthings import lanczos

    ours, theirs = _hessians(w)
    options: dict[str, Any] = {"k": 5, "tol": 1e-3, "which": "LA", "seed": 0}
    steps = next(n for n in range(20, 400, 10) if bool(lanczos(theirs, max_iter=n, **options).converged.all()))
    generator = torch.Generator()
    runs: dict[str, Run] = {
        "nngeom": lambda: ours.lanczos(5, tol=1e-3, generator=generator.manual_seed(0))[0],
        "hessian-eigenthings": lambda: lanczos(theirs, max_iter=steps, **options).eigenvalues,
    }
    return "hessian-eigenthings: the five largest eigenvalues", runs, lambda y: y.sort().values, {}


def _hessians(w: Workload) -> tuple[Any, Any]:
    from hessian_eigenthings import HessianOperator, supervised_loss

    theirs = HessianOperator(w.model, w.batches, supervised_loss(F.cross_entropy))
    return nng.Hessian(w.model, w.batches, nng.PMatImplicit, loss="cross_entropy"), theirs


def factors(w: Workload) -> Job:
    """Kronecker factors of one sampled label an example, all data as one batch, which kfac-jax compiles."""
    from benchmarks.peers import kfac_jax

    batch = [(torch.cat([x for x, _ in w.batches]), torch.cat([y for _, y in w.batches]))]
    generator = torch.Generator().manual_seed(0)
    update, floor = kfac_jax.estimate(w.model, *batch[0])
    runs: dict[str, Run] = {
        "nngeom": lambda: _inputs_of_ours(nng.FIM_MonteCarlo(w.model, batch, nng.PMatKFAC, generator=generator)),
        "kfac-jax": update,
    }
    return "kfac-jax: Kronecker factors, one sampled label", runs, lambda y: torch.cat(y), {"kfac-jax": floor}


def _inputs_of_ours(m: Any) -> list[Tensor]:
    """The factors of inputs, whose draws are none."""
    return [block.a[0].flatten() for block in m.blocks.values()]


JOBS: dict[str, tuple[tuple[str, ...], Callable[[Workload], Job]]] = {
    "laplace, kron": (("W2",), _posterior("kron")),
    "laplace, diag": (("W2",), _posterior("diag")),
    "product": (("W1", "W2"), product),
    "eigenvalues": (("W2",), largest),
    "kfac-jax": (("W1",), factors),
}


def measured(name: str, w: Workload, repeats: int) -> dict[str, Any]:
    """One job on one workload: milliseconds and multiples of the floor."""
    torch.manual_seed(0)
    title, runs, numbers, floors = JOBS[name][1](w)
    kept, left, expected = {}, {}, None
    for contender, run in runs.items():
        try:
            found = numbers(run()).double()
        except Exception as error:
            left[contender] = f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
            continue
        expected = found if expected is None else expected
        wrong = float((found - expected).norm() / expected.norm())
        if wrong > CLOSE:
            left[contender] = f"differs by {wrong:.1e}"
        else:
            kept[contender] = run
    if "nngeom" not in kept:
        raise RuntimeError(f"{name} on {w.name}: {left['nngeom']}")
    series = interleaved(w.floor, kept | {f"floor of {k}": run for k, run in floors.items()}, repeats)
    timed = {contender: s.summary() for contender, s in series.items()}
    return {"job": name, "workload": w.name, "title": title, "contenders": timed, "left": left}


def markdown(results: dict[str, Any]) -> str:
    """The table of the documentation."""
    lines = ["| job | workload | nngeom, floors | others, floors | others / nngeom |", "|---|---|---|---|---|"]
    for r in results["specialities"]:
        timed = r["contenders"]
        others = {k: s for k, s in timed.items() if k not in ("nngeom", "floor") and not k.startswith("floor of ")}
        shown = [f"{k} {s['ratio']:.3g}{_own(timed, k)}" for k, s in others.items()]
        shown += [f"{k}: {why}" for k, why in r["left"].items()]
        mine = timed["nngeom"]
        times = ", ".join(f"{s['median_ms'] / mine['median_ms']:.2f}" for s in others.values()) or "-"
        lines.append(f"| {r['title']} | {r['workload']} | {mine['ratio']:.3g} | {'; '.join(shown)} | {times} |")
    return "\n".join(lines)


def _own(timed: dict[str, Any], contender: str) -> str:
    """In floors of its own framework, where it has one."""
    floor = timed.get(f"floor of {contender}")
    return "" if floor is None else f" ({timed[contender]['median_ms'] / floor['median_ms']:.3g} of its own)"


def main(argv: list[str] | None = None) -> None:
    """Run the chosen jobs, write JSON and the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.specialities", description=__doc__)
    parser.add_argument("--job", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write the results here; other rows of the file stay")
    parser.add_argument("--render", action="store_true", help="run nothing")
    parser.add_argument("--docs", help="write the table into this Markdown file, between its marks")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = report.load(options.json)
    for name in [] if options.render else options.job:
        for where in JOBS[name][0]:
            record = measured(name, workload(where), options.repeats)
            rows = report.replaced(results.get("specialities", []), record, ("job", "workload"))
            rows.sort(key=lambda r: (list(JOBS).index(r["job"]), r["workload"]))
            results = report.merge(options.json, environment=report.environment("cpu"), specialities=rows)
            print(markdown({"specialities": [record]}), flush=True)
    if options.docs:
        report.into(options.docs, "specialities", markdown(results))


if __name__ == "__main__":
    main()
