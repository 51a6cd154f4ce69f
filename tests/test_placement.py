"""The rules of operations that keep examples apart, each against derivatives of the operation.

A new rule is tested by one line of ``OPERATIONS``: the operation and the sizes of its inputs, in which three is the
number of examples. Whatever axis of the output holds them: where a rule names an axis of an input, no entry of an
example may depend on the input of another.
"""

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from nngeom.capture.graph import operation, read
from nngeom.pullback.axes import ExampleAxis
from nngeom.pullback.placement import ASK, places
from nngeom.pullback.safe import RULES

N = 3
f64 = torch.float64
I = torch.tensor([1, 0, 1, 1])
ENTRYWISE = """
    abs acos angle asin asinh atan ceil cos cosh deg2rad digamma erf erfc erfinv exp exp2 expm1 floor frac i0 lgamma log
    log10 log1p log2 neg rad2deg reciprocal relu round rsqrt sgn sigmoid sign sin sinc sinh sqrt tan tanh trunc atanh
    logit nan_to_num
    special.entr special.i0e special.i1 special.i1e special.log_ndtr special.ndtri special.erfcx positive square
""".split()
ACTIVATIONS = (
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish relu6 selu silu "
    "softplus softshrink softsign tanhshrink"
)
BINARY = (
    "add sub mul div atan2 copysign fmax fmin fmod hypot logaddexp logaddexp2 maximum minimum pow "
    "remainder xlogy special.xlog1py true_divide rsub"
)


def named(path):
    thing = torch
    for part in path.split("."):
        thing = getattr(thing, part)
    return thing


def unit(*shape):  # numbers in (0, 1), where all functions are defined
    return lambda: 0.1 + 0.8 * torch.rand(*shape, dtype=f64)


def positive(*shape):  # symmetric positive matrices
    def draw():
        a = torch.randn(*shape, dtype=f64)
        return a @ a.mT + torch.eye(shape[-1], dtype=f64)

    return draw


def second(f, wrt=0):
    """The derivative of ``f`` in one input, whose own derivatives it has."""

    def g(*inputs):
        y = f(*inputs)
        return torch.autograd.grad(y.square().sum(), inputs[wrt], create_graph=True)[0]

    return g


def written_out(*operands):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*operands)


OPERATIONS = {
    **{name: (named(name), unit(2, 3, 4)) for name in ENTRYWISE},
    **{f"F.{name}": (getattr(F, name), unit(2, 3, 4)) for name in ACTIVATIONS.split()},
    **{f"{name} broadcast": (named(name), unit(2, 1, 3), unit(3, 1)) for name in BINARY.split()},
    **{f"{name} alike": (named(name), unit(3, 3), unit(3, 3)) for name in BINARY.split()},
    "acosh": (torch.acosh, lambda: 1.5 + torch.rand(3, 2, dtype=f64)),
    "addcmul": (torch.addcmul, unit(3, 2), unit(1, 2), unit(3, 1)),
    "addcdiv": (torch.addcdiv, unit(3, 2), unit(1, 2), unit(3, 1)),
    "lerp": (lambda a, b, w: torch.lerp(a, b, w), unit(3, 2), unit(3, 1), unit(3, 2)),
    "clamp": (lambda x: x.clamp(0.3, 0.6), unit(3, 2)),
    "clamp by tensor": (lambda x, y: x.clamp_min(y).clamp_max(0.9 + y), unit(3, 2), unit(3, 1)),
    "clone": (torch.clone, unit(3, 2)),
    "cast": (lambda x: x.float().double(), unit(3, 2)),
    "expand": (lambda x: x.expand(4, 3, 2, 3), unit(3, 1, 3)),
    "where": (lambda x, y: torch.where(x.detach() > 0.5, x, y), unit(3, 3), unit(1, 3)),
    "masked_fill": (lambda x: x.masked_fill(x.detach() > 0.5, 0.0), unit(3, 2)),
    "prelu": (F.prelu, lambda: torch.randn(3, 4, 2, dtype=f64), unit(4)),
    "tril": (lambda x: x.tril() + x.triu(1), unit(3, 3, 3)),
    "threshold": (lambda x: F.threshold(x, 0.5, 0.2), unit(3, 2)),
    "complex": (lambda x, y: torch.view_as_real(torch.complex(x, y)), unit(3, 2), unit(3, 2)),
    "polar": (lambda x, y: torch.view_as_real(torch.polar(x, y)), unit(3, 2), unit(3, 2)),
    "conj": (lambda x: torch.view_as_real(torch.view_as_complex(x).conj_physical() * 1j), unit(3, 4, 2)),
    "igamma": (lambda x, y: torch.igamma(x.detach(), y), unit(3, 2), unit(3, 2)),
    "dropout": (lambda x: F.dropout(x, 0.5, True), unit(3, 4)),
    "rrelu": (lambda x: F.rrelu(x - 0.5, training=True), unit(3, 4)),
    "tanh twice": (second(torch.tanh), unit(3, 2)),
    "sigmoid twice": (second(torch.sigmoid), unit(3, 2)),
    "gelu twice": (second(F.gelu), unit(3, 2)),
    "softplus twice": (second(F.softplus), unit(3, 2)),
    "elu twice": (second(F.elu), unit(3, 2)),
    "silu twice": (second(F.silu), unit(3, 2)),
    "leaky_relu twice": (second(F.leaky_relu), unit(3, 2)),
    "relu twice": (second(F.relu), unit(3, 2)),
    "hardtanh twice": (second(F.hardtanh), unit(3, 2)),
    "hardswish twice": (second(F.hardswish), unit(3, 2)),
    "logsigmoid twice": (second(F.logsigmoid), unit(3, 2)),
    "softmax twice": (second(lambda x: x.softmax(1)), unit(3, 3, 3)),
    "log_softmax twice": (second(lambda x: x.log_softmax(1)), unit(3, 3, 3)),
    "linear twice": (second(F.linear), unit(3, 4), unit(5, 4)),
    "reshape": (lambda x: x.reshape(6, 2, 3), unit(2, 3, 2, 3)),
    "reshape apart": (lambda x: x.reshape(2, 3, 4, 1), unit(6, 4)),
    "flatten": (lambda x: x.flatten(1), unit(3, 2, 3)),
    "unflatten and back": (lambda x: x.reshape(9, 2).reshape(3, 3, 2).transpose(0, 1), unit(3, 6)),
    "reshape of a transpose": (lambda x: x.transpose(0, 1).reshape(6, 3), unit(3, 2, 3)),
    "view": (lambda x: x.view(3, 1, 6).squeeze(1).unsqueeze(0).squeeze(), unit(3, 6)),
    "squeeze of axes": (lambda x: x.squeeze((1, 2)), unit(3, 1, 1, 3)),
    "permute": (lambda x: x.permute(2, 0, -2), unit(3, 3, 3)),
    "transpose": (lambda x: x.transpose(-1, 0), unit(3, 2, 3)),
    "t": (lambda x: x.t(), unit(3, 3)),
    "select": (lambda x: x[:, -1], unit(3, 4, 3)),
    "unbind": (lambda x: sum(x.unbind(1)), unit(3, 4, 3)),
    "stack": (lambda x, y: torch.stack([x, y, x], -2), unit(3, 3), unit(3, 3)),
    "repeat": (lambda x: x.repeat(2, 1, 3), unit(3, 1)),
    "repeated": (lambda x: x.repeat(2, 1), unit(3, 3)),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 0), unit(3, 2)),
    "cat": (lambda x, y: torch.cat([x, y], 1), unit(3, 2, 3), unit(3, 4, 3)),
    "cat to three": (lambda x, y: torch.cat([x, y], 0), unit(1, 3), unit(2, 3)),
    "cumsum": (lambda x: x.cumsum(1), unit(3, 3, 3)),
    "cumprod": (lambda x: x.cumprod(1), unit(3, 3, 3)),
    "logcumsumexp": (lambda x: x.logcumsumexp(1), unit(3, 3, 3)),
    "fft": (lambda x: torch.view_as_real(torch.fft.fft2(x)), unit(3, 3, 3)),
    "rfft": (lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), dim=1, n=3), unit(3, 3, 3)),
    "flip": (lambda x: x.flip(1), unit(3, 3, 3)),
    "roll": (lambda x: x.roll(1, 1), unit(3, 3, 3)),
    "roll of all": (lambda x: x.roll(1), unit(3, 3)),
    "gather": (lambda x: x.gather(1, torch.randint(0, 3, (3, 4, 3))), unit(3, 3, 3)),
    "glu": (lambda x: F.glu(x, 1), unit(3, 6, 3)),
    "index_select": (lambda x: x.index_select(1, I), unit(3, 2, 3)),
    "softmax": (lambda x: x.softmax(1), unit(3, 3, 3)),
    "log_softmax": (lambda x: x.log_softmax(-1), unit(3, 3, 3)),
    "scatter": (lambda x, y: x.scatter(1, torch.randint(0, 3, (3, 3, 3)), y), unit(3, 3, 3), unit(3, 3, 3)),
    "scatter_add": (lambda x, y: x.scatter_add(1, torch.randint(0, 3, (3, 3, 3)), y), unit(3, 3, 3), unit(3, 3, 3)),
    "slice": (lambda x: x[:, 1:], unit(3, 4, 3)),
    "slice of one example more": (lambda x: x[1:], unit(4, 3)),
    "sort": (lambda x: x.sort(1).values, unit(3, 3, 3)),
    "split": (lambda x: torch.cat([y + 1 for y in x.split(2, 1)], 1), unit(3, 4, 3)),
    "split with sizes": (lambda x: x.split([1, 3], 1)[1], unit(3, 4, 3)),
    "split to cells": (lambda x: x.unsafe_chunk(3, 1)[0] + x.unsafe_split_with_sizes([3, 6], 1)[0], unit(3, 9)),
    "topk": (lambda x: x.topk(2, 1).values, unit(3, 4, 3)),
    "select_scatter": (lambda x, y: x.select_scatter(y, 1, 0), unit(3, 3), unit(3)),
    "slice_scatter": (lambda x, y: x.slice_scatter(y, 1, 0, 2), unit(3, 3), unit(3, 2)),
    "cross": (lambda x, y: torch.linalg.cross(x, y, dim=1), unit(3, 3, 3), unit(3, 3, 3)),
    "pad": (lambda x: F.pad(x, (1, 0, 0, 0, 0, 0)), unit(3, 3, 3)),
    "pad by a shift": (lambda x: F.pad(x, (0, 0, 1, -1)), unit(3, 3)),
    "reflect": (lambda x: F.pad(x, (1, 1), "reflect"), unit(3, 3, 3)),
    "reflect 2d": (lambda x: F.pad(x, (1, 1, 0, 1), "reflect"), unit(3, 3, 3, 3)),
    "reflect 3d": (lambda x: F.pad(x, (1, 1, 0, 1, 0, 0), "reflect"), unit(3, 2, 3, 3, 3)),
    "replicate": (lambda x: F.pad(x, (1, 1), "replicate"), unit(3, 3, 3)),
    "replicate 2d": (lambda x: F.pad(x, (1, 1, 0, 1), "replicate"), unit(3, 3, 3, 3)),
    "replicate 3d": (lambda x: F.pad(x, (1, 1, 0, 1, 0, 0), "replicate"), unit(3, 2, 3, 3, 3)),
    "windows": (lambda x: x.unfold(1, 2, 1), unit(3, 4, 3)),
    "sum": (lambda x: x.sum(1), unit(3, 4, 3)),
    "sum kept": (lambda x: x.sum((1, -1), keepdim=True), unit(3, 4, 3)),
    "mean": (lambda x: x.mean(-2), unit(3, 4, 3)),
    "nansum": (lambda x: x.nansum(1), unit(3, 4, 3)),
    "var": (lambda x: x.var(1) + x.std(1), unit(3, 4, 3)),
    "var_mean": (lambda x: torch.var_mean(x, 1)[0] + torch.std_mean(x, 1)[1], unit(3, 4, 3)),
    "logsumexp": (lambda x: x.logsumexp(1), unit(3, 4, 3)),
    "amax": (lambda x: x.amax(1) + x.amin(1), unit(3, 4, 3)),
    "aminmax": (lambda x: torch.aminmax(x, dim=1)[0], unit(3, 4, 3)),
    "max": (lambda x: x.max(1).values + x.min(1).values, unit(3, 4, 3)),
    "mode": (lambda x: x.mode(1).values, unit(3, 4, 3)),
    "median": (lambda x: x.median(1).values + x.nanmedian(1).values + x.kthvalue(2, 1).values, unit(3, 4, 3)),
    "prod": (lambda x: x.prod(1), unit(3, 4, 3)),
    "norm": (lambda x: x.norm(dim=1) + torch.linalg.vector_norm(x, 3, 1), unit(3, 4, 3)),
    "index": (lambda x: x[:, I], unit(3, 2, 3)),
    "index by a table": (lambda x: x[:, I.view(2, 2)], unit(3, 2, 3)),
    "index examples": (lambda x: x[torch.tensor([2, 0, 1])], unit(3, 3)),
    "index pairs": (lambda x: x[torch.arange(3), torch.randint(0, 3, (3,))], unit(3, 3, 3)),
    "nll": (lambda x: F.nll_loss(x, torch.tensor([0, 1, 1]), reduction="none"), unit(3, 3)),
    "nll of positions": (lambda x: F.nll_loss(x, torch.randint(0, 3, (3, 2, 3)), reduction="none"), unit(3, 3, 2, 3)),
    "bce": (lambda x: F.binary_cross_entropy(x, torch.rand(3, 3, dtype=f64), reduction="none"), unit(3, 3)),
    "bce of logits": (
        lambda x: F.binary_cross_entropy_with_logits(x, torch.rand(3, 3, dtype=f64), reduction="none"),
        unit(3, 3),
    ),
    "mse": (lambda x, y: F.mse_loss(x, y, reduction="none"), unit(3, 3), unit(3, 3)),
    "huber": (
        lambda x, y: F.smooth_l1_loss(x, y, reduction="none") + F.huber_loss(x, y, reduction="none"),
        unit(3, 3),
        unit(3, 3),
    ),
    "soft margin": (lambda x: F.soft_margin_loss(x, torch.ones(3, 3, dtype=f64), reduction="none"), unit(3, 3)),
    "mm": (torch.mm, unit(3, 3), unit(3, 3)),
    "addmm": (torch.addmm, unit(3), unit(3, 3), unit(3, 3)),
    "bmm": (torch.bmm, unit(3, 2, 3), unit(3, 3, 3)),
    "baddbmm": (torch.baddbmm, unit(3, 1, 3), unit(3, 2, 4), unit(3, 4, 3)),
    "mv": (torch.mv, unit(3, 4), unit(4)),
    "linear": (F.linear, unit(3, 2, 4), unit(3, 4), unit(3)),
    "einsum": (lambda x, y: torch.einsum("nec,nm->ecm", x, y), unit(3, 3, 2), unit(3, 3)),
    "cdist": (torch.cdist, unit(3, 3, 2), unit(3, 3, 2)),
    "cdist of few": (
        lambda x, y: torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist"),
        unit(3, 3, 2),
        unit(3, 3, 2),
    ),
    "attention": (F.scaled_dot_product_attention, unit(3, 3, 3, 2), unit(3, 3, 3, 2), unit(3, 3, 3, 2)),
    "attention with a mask": (F.scaled_dot_product_attention, *[unit(3, 2, 3, 2)] * 3, unit(3, 1, 3, 3)),
    "attention written out": (written_out, *[unit(3, 3, 3, 2)] * 3, unit(3, 3)),
    "inverse": (torch.linalg.inv, positive(3, 3, 3)),
    "cholesky": (torch.linalg.cholesky, positive(3, 3, 3)),
    "solve": (torch.linalg.solve, positive(3, 3, 3), unit(3, 3, 3)),
    "solve triangular": (
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=False),
        positive(3, 3, 3),
        unit(3, 3, 3),
    ),
    "cholesky_solve": (torch.cholesky_solve, unit(3, 3, 3), positive(3, 3, 3)),
    "det": (lambda a: torch.linalg.det(a) + torch.linalg.slogdet(a)[1], positive(3, 3, 3)),
    "eigh": (lambda a: torch.linalg.eigvalsh(a), positive(3, 3, 3)),
    "svd": (lambda a: torch.linalg.svdvals(a), unit(3, 3, 3)),
    "qr": (lambda a: torch.linalg.qr(a)[1], positive(3, 3, 3)),
    "matrix_exp": (torch.linalg.matrix_exp, unit(3, 3, 3)),
    "conv": (F.conv2d, unit(3, 3, 4, 4), unit(3, 3, 2, 2), unit(3)),
    "conv of groups": (lambda x, w: F.conv1d(x, w, groups=3), unit(3, 3, 4), unit(3, 1, 2)),
    "deconv": (F.conv_transpose1d, unit(3, 3, 4), unit(3, 3, 2)),
    "max_pool": (lambda x: F.max_pool2d(x, 2), unit(3, 3, 4, 4)),
    "max_pool of one image": (lambda x: F.max_pool2d(x, 2), unit(3, 4, 4)),
    "max_pool 1d": (lambda x: F.max_pool1d(x, 2), unit(3, 3, 4)),
    "max_pool 3d": (lambda x: F.max_pool3d(x, 2), unit(3, 3, 2, 2, 2)),
    "avg_pool": (lambda x: F.avg_pool2d(x, 2), unit(3, 3, 4, 4)),
    "avg_pool 1d": (lambda x: F.avg_pool1d(x, 2), unit(3, 3, 4)),
    "avg_pool 3d": (lambda x: F.avg_pool3d(x, 2), unit(3, 3, 2, 2, 2)),
    "adaptive pools": (lambda x: F.adaptive_avg_pool2d(x, 2) + F.adaptive_max_pool2d(x, 2), unit(3, 3, 4, 4)),
    "adaptive pools 3d": (lambda x: F.adaptive_avg_pool3d(x, 2) + F.adaptive_max_pool3d(x, 2), unit(3, 3, 4, 4, 4)),
    "upsample 1d": (lambda x: F.interpolate(x, 6) + F.interpolate(x, 6, mode="linear"), unit(3, 3, 4)),
    "upsample 2d": (
        lambda x: sum(F.interpolate(x, (6, 6), mode=m) for m in ("nearest", "bilinear", "bicubic", "nearest-exact")),
        unit(3, 3, 4, 4),
    ),
    "upsample 3d": (
        lambda x: sum(F.interpolate(x, (3, 3, 3), mode=m) for m in ("nearest", "trilinear", "nearest-exact")),
        unit(3, 3, 2, 2, 2),
    ),
    "upsample 1d exact": (lambda x: F.interpolate(x, 6, mode="nearest-exact"), unit(3, 3, 4)),
    "upsample smoothed": (lambda x: F.interpolate(x, (2, 2), mode="bilinear", antialias=True), unit(3, 3, 4, 4)),
    "upsample smoothed more": (lambda x: F.interpolate(x, (2, 2), mode="bicubic", antialias=True), unit(3, 3, 4, 4)),
    "pixel_shuffle": (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2) + 1, 2), unit(3, 4, 3, 3)),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 2), unit(3, 4, 3)),
    "im2col": (lambda x: F.fold(F.unfold(x, 2) * 2, (3, 3), 2), unit(3, 3, 3, 3)),
    "grid_sample": (lambda x, g: F.grid_sample(x, g, align_corners=False), unit(3, 3, 4, 4), unit(3, 3, 3, 2)),
    "grid_sample 3d": (lambda x, g: F.grid_sample(x, g, align_corners=False), unit(3, 3, 2, 2, 2), unit(3, 3, 2, 2, 3)),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), unit(3, 4, 3), unit(4), unit(4)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (2,), w, b), unit(3, 3, 2), unit(2), unit(2)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (2,), w), unit(3, 3, 2), unit(2)),
    "batch_norm": (
        lambda x, w: F.batch_norm(x, torch.zeros(3, dtype=f64), torch.ones(3, dtype=f64), w),
        unit(3, 3, 3),
        unit(3),
    ),
    "batch_norm of the batch": (lambda x, w: F.batch_norm(x, None, None, w, training=True), unit(3, 3, 3), unit(3)),
    "instance_norm": (lambda x, w: F.instance_norm(x, weight=w), unit(3, 3, 4), unit(3)),
}
ELSEWHERE = {  # kernels of other devices, and forms that no public function gives on this one
    *"CopyBackwards CudnnBatchNorm CudnnConvolution MiopenBatchNorm MkldnnConvolution MkldnnLinear "
    "MkldnnMaxPool2D MpsConvolution Linear".split(),
    *"NativeBatchNormLegit NativeBatchNormLegitNoTraining BatchNormWithUpdate ConvDepthwise2D SlowConv2D "
    "FusedDropout".split(),
    *"ScaledDotProductFlashAttention ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention".split(),
    *"ScaledDotProductFusedAttentionOverrideable FakeQuantizePerTensorAffineCachemask MaxPool2D Conj "
    "NegView Igammac ".split(),
    *"Alias Polygamma NativeDropout FusedRmsNorm Norm".split(),
}


def measured(name):
    """The output, its inputs, drawn anew."""
    f, *draws = OPERATIONS[name]
    inputs = [draw().requires_grad_() for draw in draws]
    return f(*inputs), inputs


def underived(y):
    """Whether torch has no derivative of the operation that made ``y``."""
    return y.grad_fn is not None and y.grad_fn.name() == "torch::autograd::NotImplemented"


def placed(y, inputs):
    """Where the graph says that the examples lie in the inputs, the first axis of ``y`` holding them."""
    graph = read(y, {}, ())
    found = places(graph, N)
    at = {id(leaf): found.get((node, 0), ASK) for node, leaf in graph.leaves.items()}
    return [at.get(id(x), ASK) for x in inputs]


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_example_depends_on_the_input_of_another(name):
    told = 0
    for seed in range(3):
        torch.manual_seed(seed)
        y, inputs = measured(name)
        if underived(y):
            pytest.skip(f"torch {torch.__version__} has no derivative of it")
        for dim in (d for d in range(y.ndim) if y.shape[d] == N):
            z = y.movedim(dim, 0)
            for x, place in zip(inputs, placed(z, inputs)):
                if not isinstance(place, ExampleAxis):
                    continue
                told += 1
                for i in range(N):
                    (g,) = torch.autograd.grad(
                        (z[i] * torch.randn_like(z[i])).sum(), x, retain_graph=True, allow_unused=True
                    )
                    if g is not None:
                        rows = place.split(g, N, 0, g.ndim).flatten(1)
                        assert not rows[[j for j in range(N) if j != i]].any(), (dim, place)
    refused = {
        "roll of all",
        "repeated",
        "index examples",
        "index pairs",
        "pad by a shift",
        "cat to three",
        "slice of one example more",
    }
    assert told or name in refused | {"repeat_interleave", "linear twice"}, "no rule placed the examples of any axis"


def test_every_rule_is_tested():
    names = set()
    for name in OPERATIONS:
        y, _ = measured(name)
        names |= {operation(node) for node in read(y, {}, ()).nodes}
    lacking = {"Aminmax"} if underived(measured("aminmax")[0]) else set()  # torch 2.6
    untested = set(RULES) - names - ELSEWHERE - lacking
    assert not untested, sorted(untested)
    assert not (names & ELSEWHERE), sorted(names & ELSEWHERE)
