"""What every object offers at a prompt: numpy reads it, notebooks show it, it moves between devices and dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import Self

from nngeom.core.html import card, table

FACTS = ("shape", "outputs", "rows", "columns", "examples", "dtype", "device")


class InHand:
    """Matrices, kernels, Jacobians and vectors as users hold them; derived from ``to`` and the entries."""

    __array_ufunc__ = None  # numpy leaves x * M and x @ M to the object, so that numbers of numpy scale it

    if TYPE_CHECKING:

        def to(self, *args: Any, **kwargs: Any) -> Self: ...

    # -- moving --------------------------------------------------------------------------------------------------------

    def cpu(self) -> Self:
        """In the memory of the CPU."""
        return self.to("cpu")

    def cuda(self, device: Any = None) -> Self:
        """On a CUDA ``device``, the current one by default."""
        return self.to(
            "cuda" if device is None else torch.device("cuda", device) if isinstance(device, int) else device
        )

    def double(self) -> Self:
        """In float64."""
        return self.to(torch.float64)

    def float(self) -> Self:
        """In float32."""
        return self.to(torch.float32)

    # -- reading -------------------------------------------------------------------------------------------------------

    def entries_tensor(self) -> Tensor:
        """All entries, for numpy: the dense matrix, or the tensor of what has one."""
        whole: Any = self
        entries: Tensor = whole.to_dense() if hasattr(whole, "to_dense") else whole.tensor
        return entries

    def __array__(self, dtype: Any = None, *, copy: bool | None = None) -> Any:
        entries = self.entries_tensor().detach().cpu()
        if entries.dtype == torch.bfloat16:  # which numpy does not have
            entries = entries.float()
        array = entries.numpy()
        return array.astype(dtype or array.dtype, copy=copy is not False)

    # -- showing -------------------------------------------------------------------------------------------------------

    def facts(self) -> dict[str, str]:
        """What is told of the whole, by name."""
        given = {name: getattr(self, name, None) for name in FACTS}
        return {name: _text(x) for name, x in given.items() if isinstance(x, (tuple, int, torch.dtype, torch.device))}

    def listed(self) -> tuple[list[str], list[list[str]]]:
        """What is told of the parts: column headings, the last that of a number, and one line of cells a part."""
        return [], []

    def _repr_html_(self) -> str:
        head, rows = self.listed()
        return card(type(self).__name__, self.facts(), *([table(head, rows, numbers=1)] if rows else []))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " x ".join(map(str, value)) or "1"
    return str(value).removeprefix("torch.")
