"""What each representation of the Fisher matrix loses on a residual net, along training: George 2023, figures 3 to 6.

    python examples/thesis_representations.py [--data FOLDER] [--model resnet] [--seeds 3] [--quick]

A residual net of 174 778 parameters learns MNIST. At four points of training the Fisher matrix of 200 test images is
estimated with 5 labels an image drawn from the model, in every representation that fits into memory, and judged by the
implicit exact matrix: trace, ``v^T F v``, ``F v``, and ``(M + x)^-1 (F + x) v`` against damping, for ``v`` uniform on
the sphere. The same draws as an implicit matrix show what Monte-Carlo alone costs.

Protocol: thesis section 3.4.1 (there ResNet-50 of 24 M parameters on TinyImagenet).
"""

from __future__ import annotations

from typing import Any

import torch
from geometry_common import COLOURS, Data, accuracy, figure
from lazy_common import save
from optimizer_tables import table
from papers_common import Cells, mean, options, place, seeds_of, spread
from papers_nets import descend, images, network, settle
from torch import nn

import nngeom as nng

PAGE = "papers.md"
REPRESENTATIONS: dict[str, Any] = {
    "Diag": nng.PMatDiag,
    "QuasiDiag": nng.PMatQuasiDiag,
    "KFAC": nng.PMatKFAC,
    "KFAC reduce": nng.PMatKFAC.options(sharing="reduce"),
    "KFAC sua": nng.PMatKFAC.options(sua=True),
    "EKFAC": nng.PMatEKFAC,
    "Implicit": nng.PMatImplicit,
}
DAMPINGS = [10.0**e for e in range(-4, 4)]
TABLE_DAMPING = 0.1
SAMPLES = 5
STYLES = {
    "EKFAC": {"lw": 3.2, "alpha": 0.7},
    "QuasiDiag": {"ls": "--"},
    "KFAC sua": {"ls": ":"},
    "Implicit": {"ls": "--"},
}


def drawn(model: nn.Module, loader: list[Any], kind: Any, seed: int) -> Any:
    """The matrix of ``SAMPLES`` labels an image, the same ones for every representation."""
    generator = torch.Generator().manual_seed(seed)
    return nng.FIM_MonteCarlo(model, loader, kind, samples=SAMPLES, generator=generator)


def solves(matrix: Any, v: nng.PVector, fv: nng.PVector) -> list[nng.PVector | None]:
    """``(M + x)^-1 (F + x) v`` for every damping ``x``; ``None`` where ``M + x`` is not positive definite."""
    if isinstance(matrix, nng.PMatImplicit):
        return [None] * len(DAMPINGS)
    values, basis = matrix.eigh()
    collection = matrix.layer_collection
    inside, image = basis.T.mv(v).flat(), basis.T.mv(fv).flat()

    def solved(x: float) -> nng.PVector | None:
        if float(values.min()) + x <= 0:
            return None
        return basis.mv(nng.PVector.from_flat(collection, (image + x * inside) / (values + x)))

    return [solved(x) for x in DAMPINGS]


def assess(model: nn.Module, loader: list[Any], draws: int, seed: int) -> dict[str, Any]:
    """The errors of every representation at one point of training."""
    exact = nng.FIM(model, loader, nng.PMatImplicit)
    v = nng.PVector.randn(exact.layer_collection, draws, generator=torch.Generator().manual_seed(seed))
    v = v / v.norm()
    fv, trace = exact @ v, float(exact.trace())
    quadratic, out = v.dot(fv), {}
    for name, kind in REPRESENTATIONS.items():
        matrix = drawn(model, loader, kind, seed)
        mv, ws = matrix @ v, solves(matrix, v, fv)
        out[name] = {
            "trace": abs(float(matrix.trace()) - trace) / trace,
            "vTMv": float(((v.dot(mv) - quadratic) / quadratic).abs().mean()),
            "Mv": float((mv.dot(fv) / (mv.norm() * fv.norm())).mean()),
            "Mv residual": float(((mv - fv).norm() / fv.norm()).mean()),
            "solve": [None if w is None else float((w.dot(v) / w.norm()).mean()) for w in ws],
            "solve residual": [None if w is None else float((w - v).norm().mean()) for w in ws],
        }
    return {"trace of F": trace, "representations": out}


def trained(net: tuple[str, int], data: Data, points: tuple[int, ...], draws: int, seed: int) -> dict[str, Any]:
    """One training of a net by name and width, measured at ``points``."""
    model = network(net[0], data.shape, seed, net[1])
    settle(model, data.x[:500])
    loader = [(data.x_test[lo : lo + 100], data.y_test[lo : lo + 100]) for lo in range(0, len(data.x_test), 100)]
    seen: dict[str, Any] = {}

    def visit(step: int) -> None:
        if step in points:
            share = accuracy(model, data.x_test, data.y_test)
            seen[str(step)] = {"accuracy": share, **assess(model, loader, draws, seed)}

    descend(model, data.x, data.y, visit, steps=max(points), lr=0.05, seed=seed)
    return seen


def tables(cells: dict[str, Any]) -> dict[str, str]:
    """Means over seeds, at the first point and the last."""
    runs = seeds_of(cells, "resnet")
    steps = list(runs[0])
    rows = []
    for name in REPRESENTATIONS:
        row, at = [name], DAMPINGS.index(TABLE_DAMPING)
        for step in (steps[0], steps[-1]):
            got = [run[step]["representations"][name] for run in runs]
            row += [spread([g[key] for g in got], ".2g") for key in ("trace", "vTMv")]
            row += [spread([g["Mv"] for g in got]), spread([g["solve"][at] for g in got])]
        rows.append(row)
    what = ("trace", "vᵀFv", "cos Fv", f"cos solve, {TABLE_DAMPING:g}")
    head = ["", *(f"{w}, {when}" for when in ("start", "end") for w in what)]
    return {"thesis_representations": table(head, rows)}


def draw(cells: dict[str, Any], model: str, path: Any) -> None:
    """Errors along training above, solves against damping below."""
    runs = seeds_of(cells, model)
    steps = list(runs[0])
    fig, axes = figure(4, 2, 8.5, 11)
    axes = axes.reshape(2, 4)
    panels = {"trace": "relative error of the trace", "vTMv": "relative error of $v^T F v$", "Mv": "cos(Fv, Mv)"}
    panels["Mv residual"] = "|Mv - Fv| / |Fv|"
    for colour, name in zip(COLOURS, REPRESENTATIONS):
        for ax, key in zip(axes[0], panels):
            got = [[run[s]["representations"][name][key] for s in steps] for run in runs]
            ax.plot(
                range(len(steps)),
                [mean(column) for column in zip(*got)],
                color=colour,
                marker="o",
                ms=3,
                label=name,
                **STYLES.get(name, {}),
            )
            low, high = ([f(column) for column in zip(*got)] for f in (min, max))
            ax.fill_between(range(len(steps)), low, high, color=colour, alpha=0.15, lw=0)
        for ax, step in zip(axes[1], steps):
            got = [run[step]["representations"][name]["solve"] for run in runs]
            whole = [[c[j] for c in got] for j in range(len(DAMPINGS)) if all(c[j] is not None for c in got)]
            x = [d for j, d in enumerate(DAMPINGS) if all(c[j] is not None for c in got)]
            ax.plot(x, [mean(w) for w in whole], color=colour, marker="o", ms=3, **STYLES.get(name, {}))
            ax.fill_between(x, [min(w) for w in whole], [max(w) for w in whole], color=colour, alpha=0.15, lw=0)
    for ax, title in zip(axes[0], panels.values()):
        ax.set(title=title, xticks=range(len(steps)), xticklabels=steps, xlabel="step")
    for ax in axes[0, [0, 1, 3]]:
        ax.set(yscale="log")
    axes[0, 1].minorticks_off()
    axes[0, 1].set_yticks([0.05, 0.1, 0.2, 0.5, 1], ["0.05", "0.1", "0.2", "0.5", "1"])
    for ax, step in zip(axes[1], steps):
        share = mean([run[step]["accuracy"] for run in runs])
        ax.set(title=f"solve, step {step} (accuracy {share:.2f})", xscale="log", xlabel="damping", ylim=(-0.02, 1.02))
    axes[1, 0].set(ylabel="cos(v, (M + x)⁻¹ (F + x) v)")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(fig, path)


def main(argv: list[str] | None = None) -> None:
    """All runs, one table, one figure a net."""
    args = options(__doc__, argv, models=("resnet", "resnet-gn", "vgg"), draws=5, examples=200, width=16)
    if args.quick:
        args.draws, args.examples, args.width, args.model = 2, 20, 4, ["resnet"]
    points = (0, 1) if args.quick else (0, 20, 80, 400)
    data = images(args.data, 100 if args.quick else 4000, args.examples)
    cells = Cells(
        args, "thesis_representations", draws=args.draws, examples=args.examples, points=points, width=args.width
    )
    for model in args.model:
        for seed in range(args.seeds):
            cells.add(f"{model}/{seed}", lambda m=model, s=seed: trained((m, args.width), data, points, args.draws, s))
        draw(
            cells.cells,
            model,
            args.out / "images" / f"thesis_representations{'' if model == 'resnet' else '_' + model}.png",
        )
    if seeds_of(cells.cells, "resnet"):
        place(args, PAGE, tables(cells.cells))


if __name__ == "__main__":
    main()
