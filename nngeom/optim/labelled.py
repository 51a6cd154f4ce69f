"""Steps without the wrapper that torch puts around them for profilers and hooks, where nobody asks for either."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import optimizer


def labelled_when_asked(step: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator of an optimizer's ``step``: the wrapper, a tenth of the time that tiny nets take, is put around those
    that a profiler watches, or hooks wait for.
    """
    wrapped = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def taken(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = (
            torch.autograd._profiler_enabled()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or optimizer._global_optimizer_pre_hooks
            or optimizer._global_optimizer_post_hooks
        )
        inside = type(self).step is not taken  # of a step of a subclass, around which torch puts it
        return (wrapped if asked and not inside else step)(self, *args, **kwargs)

    taken.hooked = True  # type: ignore[attr-defined]  # torch puts none around it
    return taken
