"""What torch functions do that derivatives of them cannot bear, and modes in which they do otherwise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from nngeom.capture.in_turn import saves_for_us
from nngeom.capture.written_out import COMPOSED, WRITTEN_OUT
from nngeom.core.errors import UnsupportedError

CHECKPOINTED = (
    "the model checkpoints activations, and computes them again with other kernels than those that have second "
    "derivatives; switch checkpointing off for this measure (model.eval(), or model.gradient_checkpointing_disable())"
)


@contextlib.contextmanager
def unfused(model: nn.Module | None = None) -> Iterator[None]:
    """Within: attention by its formula, and no cuDNN for the recurrent cells of ``model``."""
    may = torch.backends.cudnn.is_available()
    recurrent = may and model is not None and any(isinstance(m, nn.RNNBase) for m in model.modules())
    with (
        sdpa_kernel(SDPBackend.MATH),
        torch.backends.cudnn.flags(enabled=False) if recurrent else contextlib.nullcontext(),
    ):
        yield


@contextlib.contextmanager
def twice_differentiable(model: nn.Module | None = None) -> Iterator[None]:
    """Within: as :func:`unfused`, and :data:`COMPOSED` operations."""
    with unfused(model), _Composite():
        yield


def recomputed() -> bool:
    """Whether what autograd saves now goes to hooks, those of a checkpoint perhaps.

    A checkpoint runs the same Python again while gradients are computed, on the thread of torch's and so without any
    mode. It tells the tensors saved then by their order alone: an operation that a mode exchanged for others gives
    wrong gradients, and where shapes agree no error.
    """
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks("nngeom asks whether there are any"):
            return False
    except RuntimeError:
        return not saves_for_us()


def composed(func: Any) -> Any:
    """What is run for ``func`` where second derivatives are wanted; raises :class:`UnsupportedError` in a checkpoint,
    which would save other tensors than it computes again.
    """
    own = COMPOSED.get(func, func)
    if own is not func and recomputed():
        raise UnsupportedError(CHECKPOINTED)
    return own


class _Composite(TorchFunctionMode):
    """Runs :data:`COMPOSED` instead of the fused operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (composed(func) if func in COMPOSED else func)(*args, **(kwargs or {}))


class ReverseConventions(TorchFunctionMode):
    """What forward mode does unlike reverse mode, made the same.

    It ignores ``padding_idx`` of embeddings, whose row gets no gradient in reverse mode. The tangents of layer and
    instance norm take the saved mean and deviation for constants when they are differentiated in the input (torch
    2.13), and those of a softmax fail then: where the input requires gradients, the three are written out.
    ``composed``: :data:`COMPOSED` run instead of the fused operations, too.
    """

    def __init__(self, *, composed: bool = False) -> None:
        super().__init__()
        self._composed: dict[Any, Any] = COMPOSED if composed else {}
        self.hooked = False  # some tensor was asked to run a function on its gradient, which forward mode does not

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.hooked |= func is torch.Tensor.register_hook
        written = WRITTEN_OUT.get(func)
        if written is not None and torch.is_grad_enabled() and args and args[0].requires_grad and args[0].numel():
            return written(*args, **kwargs)
        out = self._composed.get(func, func)(*args, **kwargs)
        if func is F.embedding:
            named = dict(zip(("input", "weight", "padding_idx"), args)) | kwargs
            if named.get("padding_idx") is not None:
                padding = named["input"] == named["padding_idx"] % named["weight"].shape[0]
                out = torch.where(padding.unsqueeze(-1), out.detach(), out)
        return out


class DenseGradients(TorchFunctionMode):
    """Embeddings with ``sparse=True``, whose gradients hardly any operation takes, as if without: the numbers are the
    same.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = {F.embedding: 6, F.embedding_bag: 7}.get(func)
        if place is not None:
            if len(args) > place:
                args = (*args[:place], False, *args[place + 1 :])
            elif "sparse" in kwargs:
                kwargs = {**kwargs, "sparse": False}
        return func(*args, **kwargs)


def dense_gradients(modules: Iterable[nn.Module]) -> AbstractContextManager[Any]:
    """Within: :class:`DenseGradients`, where one of the modules may be an embedding with sparse ones."""
    sparse = any([m.__dict__.get("sparse") or hasattr(type(m), "sparse") for m in modules])
    return DenseGradients() if sparse else contextlib.nullcontext()
