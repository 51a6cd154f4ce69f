"""TensorBoard, where it is installed."""

from __future__ import annotations

import math
import os

from nngeom.core.errors import MissingExtraError


class Writer:
    """Scalars to a log directory; raises :class:`MissingExtraError` without the extra ``tensorboard``."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError("TensorBoard is not installed; install it: pip install tensorboard") from error
        self._writer = SummaryWriter(str(directory))

    def add(self, step: int, row: dict[str, float]) -> None:
        """The numbers of one measurement, but those missing."""
        for name, value in row.items():
            if name != "step" and not math.isnan(value):
                self._writer.add_scalar(f"nngeom/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
