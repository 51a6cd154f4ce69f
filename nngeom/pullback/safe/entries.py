"""Operations that act entry by entry."""

from __future__ import annotations

from typing import Any

from nngeom.pullback.axes import ExampleAxis
from nngeom.pullback.safe.rule import Place, Sizes, kept, safe


@safe(
    "Abs Acos Acosh Add Addcdiv Addcmul Alias Angle Asin Asinh Atan Atan2 Atanh Ceil Celu Clamp ClampMax ClampMin "
    "Clone Complex Conj ConjPhysical Copysign CopyBackwards Cos Cosh Deg2Rad Digamma Div Elu Erf Erfc Erfinv Exp Exp2 "
    "Expand Expm1 FakeQuantizePerTensorAffineCachemask Floor Fmax Fmin Fmod Frac Gelu Hardshrink Hardsigmoid "
    "Hardswish Hardtanh Hypot I0 Igamma Igammac LeakyRelu Lerp Lgamma Log Log10 Log1P Log2 LogSigmoid Logaddexp "
    "Logaddexp2 Logit MaskedFill Maximum Minimum Mish Mul NanToNum Neg NegView Polar Polygamma Pow PreluKernel "
    "Rad2Deg Reciprocal Relu Remainder Round Rsqrt Rsub Sgn Sigmoid Sign Silu Sin Sinc Sinh Softplus Softshrink "
    "SpecialEntr SpecialErfcx SpecialI0E SpecialI1 SpecialI1E SpecialLogNdtr SpecialNdtri SpecialXlog1Py Sqrt Sub Tan "
    "Tanh Threshold ToCopy Tril Triu Trunc Where Xlogy NativeDropout FusedDropout RreluWithNoise TanhBackward "
    "SigmoidBackward GeluBackward SoftplusBackward EluBackward HardtanhBackward HardswishBackward LeakyReluBackward "
    "ThresholdBackward LogSigmoidBackward"
)
def entrywise(node: Any, number: int, axis: ExampleAxis, out: Sizes, sizes: Sizes, n: int) -> Place:
    """Inputs are broadcast: an axis that an input lacks is shared."""
    dim = axis.at - (len(out) - len(sizes))
    if dim < 0 or (sizes[dim] == 1 and out[axis.at] != 1):
        return None
    return kept(dim, axis, out, sizes)
