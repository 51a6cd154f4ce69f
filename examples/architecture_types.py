"""Every model type of ``transformers`` that a few rules make small, against autograd of every example by itself.

    python -m examples.architecture_types                  # all: docs/data/architecture_types.json, a line of the page
    python -m examples.architecture_types --only clip bert # printed only

Nobody chose these: what a type does not know of sizes and inputs leaves it out, with the reason.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import nngeom as nng
from benchmarks import report
from examples.architectures import DOCS, TOLERANCE

EXAMPLES, TOKENS, VOCABULARY, MOST, SECONDS = 3, 8, 40, 300_000, 2.0
_SIZES = {
    16: "hidden_size d_model n_embd embed_dim embedding_size hidden_dim dim",
    24: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff n_inner intermediate_dim",
    12: "moe_intermediate_size shared_expert_intermediate_size",
    8: "patch_size d_kv head_dim q_lora_rank kv_lora_rank v_head_dim projection_dim block_size sliding_window "
    "rotary_dim num_buckets",
    4: "num_experts n_routed_experts num_local_experts state_size qk_rope_head_dim qk_nope_head_dim attention_window",
    2: "num_hidden_layers num_layers n_layer n_layers num_attention_heads n_head n_heads num_heads "
    "encoder_attention_heads decoder_attention_heads type_vocab_size num_experts_per_tok eos_token_id",
    1: "encoder_layers decoder_layers num_key_value_heads bos_token_id",
    0: "pad_token_id",
    32: "image_size sample_size",
    64: "max_position_embeddings n_positions max_source_positions max_target_positions",
    VOCABULARY: "vocab_size",
}
SIZES = {name: size for size, names in _SIZES.items() for name in names.split()}


def shrink(config: Any) -> None:
    """The sizes of a configuration and of those in it, in place; no dropout."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PretrainedConfig):
            shrink(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    for name, size in SIZES.items():
        old = getattr(config, name, None)
        if (isinstance(old, int) and not isinstance(old, bool)) or (hasattr(config, name) and name.endswith("_id")):
            setattr(config, name, size)


def batches(dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    """Inputs under their usual names, one of which a model may take."""
    ids = torch.randint(3, VOCABULARY, (EXAMPLES, TOKENS))
    images = torch.randn(EXAMPLES, 3, 32, 32, dtype=dtype)
    yield {"input_ids": ids}
    yield {"pixel_values": images}
    yield {"input_values": torch.randn(EXAMPLES, 1200, dtype=dtype)}
    yield {"input_features": torch.randn(EXAMPLES, 80, 64, dtype=dtype)}
    yield {"input_ids": ids, "decoder_input_ids": ids[:, :6]}
    yield {"input_ids": ids, "pixel_values": images}


def first(results: Any) -> Tensor | None:
    """The first tensor of real numbers that has one row or more an example."""
    found = results.values() if hasattr(results, "values") else results
    return next((t for t in found if isinstance(t, Tensor) and t.is_floating_point() and t.ndim > 1), None)


def made(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Tensor]]:
    """A small model of a type and a batch that it takes; raises where there is none."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[name]()
    shrink(config)
    model = transformers.AutoModel.from_config(config).to(dtype).eval()
    if (size := sum(p.numel() for p in model.parameters())) > MOST:
        raise ValueError(f"{size} parameters")
    reasons = []
    for batch in batches(dtype):
        try:
            with torch.no_grad():
                out = first(model(**batch))
        except Exception as error:
            reasons.append(str(error))
        else:
            if out is not None and len(out) == EXAMPLES and bool(out.isfinite().all()):
                return model, batch
    raise ValueError(reasons[0] if reasons else "no outputs")


def function_of(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    """Two numbers an example, of all that the model gives for it."""

    def function(batch: dict[str, Tensor], *_: Any) -> Tensor:
        out = first(model(**batch))
        assert out is not None
        flat = out.flatten(1)
        along = torch.linspace(-1, 1, flat.shape[1], dtype=flat.dtype)
        return torch.stack([flat @ (3 * along + 0.1).sin(), flat.tanh() @ (5 * along).cos()], 1)

    return function


def rows_of(model: nn.Module, batch: dict[str, Tensor], function: Any) -> Tensor:
    """``(2, n, d)``: every example by itself."""
    parameters, rows = [p for p in model.parameters() if p.requires_grad], []
    for i in range(EXAMPLES):
        outputs = function({key: x[i : i + 1] for key, x in batch.items()})[0]
        grads = [torch.autograd.grad(f, parameters, retain_graph=True, allow_unused=True) for f in outputs]
        flat = lambda gs: torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(gs, parameters)]
        )
        rows.append(torch.stack([flat(g) for g in grads]))
    return torch.stack(rows, 1)


def outcome(name: str, dtype: torch.dtype = torch.float64) -> tuple[str, str]:
    """What became of a type, and why: ``exact``, ``refused``, ``left out``, ``WRONG`` or ``crash``."""
    try:
        model, batch = made(name, dtype)
        function = function_of(model)
        started = time.process_time()
        function(batch).sum().backward()
        if time.process_time() - started > SECONDS:
            raise ValueError("slow")
        j = rows_of(model, batch, function)
    except Exception as error:
        if dtype == torch.float64 and "got Double" in str(error):  # grouped products of experts
            return outcome(name, torch.float32)
        return "left out", f"{type(error).__name__}: {error}".split("\n")[0][:160]
    v, given = torch.linspace(-1, 1, j.shape[2], dtype=dtype).sin(), {"model": model, "function": function}
    flat, regression = j.flatten(0, 1), [(batch, torch.zeros(EXAMPLES, 2, dtype=dtype))]

    def product() -> Tensor:
        matrix = nng.GGN(**given, loader=regression, representation=nng.PMatImplicit, loss="mse")
        return matrix.mv(nng.PVector.from_flat(matrix.layer_collection, v)).flat()

    rounding = TOLERANCE if dtype == torch.float64 else 2e-3
    pairs: list[tuple[Callable[[], Tensor], Tensor, float]] = [
        (lambda: nng.Jacobian(**given, loader=[batch]).tensor, j, rounding),
        (lambda: nng.GramMatrix(**given, loader=[batch]).to_dense(), flat @ flat.T, rounding),
        (product, flat.T @ (flat @ v) / EXAMPLES, 10 * rounding),  # sums that cancel, through norms in float32
    ]
    for measure, want, tolerance in pairs:
        try:
            off = float((measure() - want).norm() / want.norm())
        except nng.NNGeomError as error:
            return "refused", f"{type(error).__name__}: {error}".split(";")[0][:160]
        except Exception as error:
            return "crash", f"{type(error).__name__}: {error}".split("\n")[0][:160]
        if not off <= tolerance:
            return "WRONG", f"relative error {off:.1e}"
    return "exact", ""


def sentence(results: dict[str, Any]) -> str:
    """For the page."""
    found = results["types"]
    counts = {kind: sum(o == kind for o, _ in found.values()) for kind in ("exact", "refused", "WRONG", "crash")}
    mixing = ", ".join(f"`{name}`" for name, (o, why) in found.items() if o == "refused" and "mixes" in why)
    others = [name for name, (o, why) in found.items() if o == "refused" and "mixes" not in why]
    return (
        f"Of {sum(counts.values())} types that ran: {counts['exact']} exact, {counts['refused']} refused, "
        f"{counts['WRONG']} wrong, {counts['crash']} crashed; {len(found) - sum(counts.values())} left out. Refused, "
        f"for the outputs of an example depend on others: {mixing}"
        + (f"; for other reasons: {', '.join(f'`{name}`' for name in others)}." if others else ".")
        + f" With {results['environment']}."
    )


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="these types, printed only")
    parser.add_argument("--render", action="store_true", help="run nothing; write the line from the file")
    parser.add_argument("--docs", type=Path, default=DOCS, help="the folder of architectures.md and data/")
    options = parser.parse_args(argv)
    path, page = options.docs / "data" / "architecture_types.json", options.docs / "architectures.md"
    if options.render:
        report.into(str(page), "types", sentence(report.load(str(path))))
        return
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    types: dict[str, tuple[str, str]] = {}
    for name in options.only or sorted(transformers.CONFIG_MAPPING):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            types[name] = outcome(name)
        print(f"{name:32s} {' '.join(types[name])}", flush=True)
    environment = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    print(sentence({"types": types, "environment": environment}))
    if not options.only:
        results = report.merge(str(path), environment=environment, types=types)
        report.into(str(page), "types", sentence(results))


if __name__ == "__main__":
    main()
