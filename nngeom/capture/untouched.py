"""Measuring changes nothing: what a forward pass does to a model and to random numbers is undone, and refused where it
matters.

A pass that draws random numbers, or that changes a buffer or a parameter, would be another one the next time; so would
one that carries a state on in other attributes (:mod:`~nngeom.capture.attributes`). What it left is put back, also when
it raised. Numbers that are drawn and never used are let pass (:mod:`~nngeom.capture.unused`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from nngeom.capture.attributes import Attributes
from nngeom.capture.other_states import OtherStates, OwnGenerators
from nngeom.capture.overwritten import Overwritten
from nngeom.core.errors import ModeError

HINT = "so a measure of it would be random: call model.eval(), or fix what it draws"


class Drew(ModeError):
    """A forward pass drew random numbers; whether they are used is not known yet."""


class Watch:
    """The state of one model, with its ``modules`` and ``parameters``, and of random numbers, around its forward
    passes.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
    ) -> None:
        self.device = device
        self.harmless = False  # numbers that are drawn were seen to be unused
        self.overwritten = Overwritten(parameters)
        self._model, self._attributes = model, Attributes(modules)
        self._own = OwnGenerators(self._attributes.modules)
        self._places = [(m, key) for m in modules for key in _names(m)]
        self._places += [(m, key) for m in self._attributes.modules for key in _plain(m)]
        self._held: list[tuple[Tensor | None, int, Tensor | None]] = [(None, -1, None)] * len(self._places)
        self._looked = (
            False  # whether values of buffers were compared, not versions only, and states of other libraries
        )

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Within: what happens to buffers and random numbers is put back, and raises :class:`ModeError`."""
        generators = self.generators()
        before = [g.get_state() for g in generators]
        others, own = None if self._looked else OtherStates(), self._own.states()
        attributes = self._attributes.hold()
        self._hold()
        finished = False
        try:
            yield
            finished = True
        finally:
            drew = [differ(g.get_state(), state) for g, state in zip(generators, before)]
            for g, state in zip(generators, before):
                if any(drew):
                    g.set_state(state)
            other = self._own.put_back(own) or ("" if others is None else others.put_back())
            self._attributes.put_back(attributes)
            written, changed = self.overwritten.put_back(), self._restore()
        if not finished:
            return
        if written:
            raise ModeError(
                f"the forward pass changes the parameters {written[:4]} of the model in place (weights that are "
                "clipped, normalised or averaged there, a table with max_norm), so that it is of another model the "
                "next time: do it before, or as a parametrization (torch.nn.utils.parametrize). They were put back"
            )
        if other:
            raise ModeError(f"the model draws random numbers of {other} in its forward pass, {HINT}")
        if changed:
            raise ModeError(
                f"the forward pass changes the buffers or tensors {changed[:4]} of the model, so that it is another "
                "one the next time (a "
                "counter, a moving average, spectral normalisation in training mode?); call model.eval(), or "
                "keep them fixed "
                "while it is measured (of a table made on the first call: call the model once before). They were "
                "put back"
            )
        if any(drew) and not self.harmless:
            raise Drew(f"the model draws random numbers in its forward pass, {HINT}")

    @contextlib.contextmanager
    def own(self, states: dict[torch.Generator, Tensor]) -> Iterator[None]:
        """Within: the same of the generators that ``states`` comes to hold, with their states before."""
        try:
            yield
        finally:
            drew = False
            for generator, state in states.items():
                drew |= differ(generator.get_state(), state)
                generator.set_state(state)
        if drew and not self.harmless:
            raise Drew(f"the model draws random numbers in its forward pass, {HINT}")

    def require_idle(self, run: Callable[[], Tensor], outputs: Tensor) -> None:
        """Raise :class:`ModeError` where ``run`` gives other ``outputs`` when it finds the attributes that the last
        pass left.
        """
        self._attributes.require_idle(run, outputs, self._name)

    @property
    def carried(self) -> Mapping[nn.Module, set[str]]:
        """The names of plain numbers that passes change, by module."""
        return self._attributes.carried

    def generators(self) -> list[torch.Generator]:
        """Torch's own, of the host and of the model's device."""
        found = [torch.default_generator]
        if self.device.type == "cuda":
            found.append(torch.cuda.default_generators[self.device.index or 0])
        return found

    def _hold(self) -> None:
        """Copies of all buffers, made anew of those that changed since."""
        for j, (module, key) in enumerate(self._places):
            now, (held, version, _) = getattr(module, key, None), self._held[j]
            if now is not held or (now is not None and now._version != version):
                self._held[j] = (
                    now,
                    -1 if now is None else now._version,
                    None if now is None else now.detach().clone(),
                )
                self._looked = False

    def _restore(self) -> list[str]:
        """The names of buffers that are not what they were; they are put back."""
        changed: list[tuple[nn.Module, str]] = []
        for j, (module, key) in enumerate(self._places):
            now, (held, version, copy) = getattr(module, key, None), self._held[j]
            untouched = now is held and (now is None or (self._looked and now._version == version))
            if untouched or (now is held and _equal(now, copy)):
                continue
            changed.append((module, key))
            if held is not None and copy is not None:
                with torch.no_grad():
                    held.copy_(copy)
            if now is not held:
                setattr(module, key, held)
        self._looked = True
        return [self._name(module, key) for module, key in changed]

    def _name(self, module: nn.Module, key: str) -> str:
        return next((f"{name}.{key}".strip(".") for name, m in self._model.named_modules() if m is module), key)


def _names(module: nn.Module) -> list[str]:
    """The buffers of a module itself."""
    own = module._buffers
    return list(own) if isinstance(own, dict) else [key for key, _ in module.named_buffers(recurse=False)]  # of scripts


def _plain(module: nn.Module) -> list[str]:
    """Attributes of a module that are tensors of numbers."""
    return [key for key, x in module.__dict__.items() if isinstance(x, Tensor) and not x.requires_grad]


def differ(state: Tensor, other: Tensor) -> bool:
    """Whether two states of a generator, which lie in the memory of the host, are not the same."""
    return bytes(state.numpy()) != bytes(other.numpy())


def _equal(x: Tensor | None, y: Tensor | None) -> bool:
    if x is None or y is None:
        return x is y
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return torch.equal(x, y) or bool((x.isnan() == y.isnan()).all() and torch.equal(x.nan_to_num(), y.nan_to_num()))
