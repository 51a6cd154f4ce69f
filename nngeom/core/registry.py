"""Classes by name, for files: a file names the class of what it holds, and must get that class back or none."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from nngeom.core.errors import ArgumentError

T = TypeVar("T")

LIBRARY = __name__.partition(".")[0] + "."


class Registry(Generic[T]):
    """Classes by their qualified names, ``module.qualname``; short ones are understood where they are unique.

    A class that is defined again by the same code (a notebook cell run twice) takes the place of the first; by other
    code it is another class, and their common name belongs to neither.
    """

    def __init__(self) -> None:
        self._classes: list[Any] = []
        self._found: dict[tuple[str, str | None], Any] = {}  # since the last class was added

    def add(self, cls: Any) -> None:
        """Remember a class; it need not be finished yet."""
        full = qualified(cls)
        self._classes = _distinct(self._classes, full) + [cls]
        self._found = {}

    def __iter__(self) -> Iterator[str]:
        """Short names."""
        return iter(sorted({cls.__name__ for cls in self._classes}))

    def classes(self) -> tuple[Any, ...]:
        """All of them."""
        return tuple(self._classes)

    def __getitem__(self, name: str) -> T:
        """The class of a qualified or short name; :class:`KeyError` for none, :class:`ArgumentError` for several."""
        return self._only(name, self._under(name) or self._short(name))

    def find(self, name: str, full: str | None) -> T:
        """The class that a file calls ``name`` and, unless it is an old one, ``full``: qualified. Errors as above.

        Classes of the library may have moved within it, and those of a script are found where it is imported.
        """
        if (name, full) not in self._found:
            self._found[name, full] = self._find(name, full)
        result: T = self._found[name, full]
        return result

    def _find(self, name: str, full: str | None) -> T:
        if full is None or self._under(full):
            return self[full or name]
        same = self._short(name)
        if full.startswith(LIBRARY):
            same = [cls for cls in same if qualified(cls).startswith(LIBRARY)]
        elif same and not full.startswith("__main__."):
            raise ArgumentError(
                f"{full!r} is not imported, and {_listed(same)} is another class of that name; "
                "import the module of the first"
            )
        return self._only(full, same)

    def is_known(self, cls: Any) -> bool:
        """Whether ``cls`` was added, and is what its qualified name means now."""
        return any(cls is known for known in self._under(qualified(cls))[-1:])

    def _under(self, full: str) -> list[Any]:
        """The different classes of a qualified name."""
        return _distinct([cls for cls in self._classes if qualified(cls) == full], full)

    def _short(self, name: str) -> list[Any]:
        found = [cls for cls in self._classes if cls.__name__ == name]
        return [cls for full in dict.fromkeys(map(qualified, found)) for cls in self._under(full)]

    def _only(self, name: str, found: list[Any]) -> T:
        if len(found) > 1:
            raise ArgumentError(
                f"{name!r} is the name of {len(found)} classes, {_listed(found)}; rename one, or import one only"
            )
        if not found:
            raise KeyError(name)
        result: T = found[0]
        return result


def qualified(cls: Any) -> str:
    """``module.qualname``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _distinct(classes: list[Any], full: str) -> list[Any]:
    """Without those of the qualified name ``full`` that were defined again, later in the list, by the same code."""
    kept: list[Any] = []
    for cls in reversed(classes):
        if qualified(cls) != full or not any(qualified(later) == full and _same(cls, later) for later in kept):
            kept.append(cls)
    return kept[::-1]


def _listed(classes: list[Any]) -> str:
    return " and ".join(map(_described, classes))


def _described(cls: Any) -> str:
    """Its qualified name and where it was written, which alone tells two of one name apart."""
    codes = [f.__code__ for f in map(_function, vars(cls).values()) if f is not None and f.__module__ == cls.__module__]
    return qualified(cls) + (f" ({codes[0].co_filename}:{codes[0].co_firstlineno})" if codes else "")


# parts of a class that say nothing of its code; a dataclass with slots is made twice, first without the last three
_BOOKKEEPING = (
    "__dict__",
    "__weakref__",
    "_abc_impl",
    "__abstractmethods__",
    "__slots__",
    "__getstate__",
    "__setstate__",
)


def _same(a: Any, b: Any) -> bool:
    """Whether two classes of one name were defined by the same code."""
    mine, theirs = (
        {k: v for k, v in vars(cls).items() if k not in _BOOKKEEPING and not isinstance(v, types.MemberDescriptorType)}
        for cls in (a, b)
    )
    bases = [[qualified(base) for base in cls.__bases__] for cls in (a, b)]
    return bases[0] == bases[1] and mine.keys() == theirs.keys() and all(_alike(mine[k], theirs[k]) for k in mine)


def _alike(x: Any, y: Any) -> bool:
    """Whether two members do the same: equal code with equal values around it, or equal values."""
    f, g = _function(x), _function(y)
    if f is None or g is None or f.__code__ != g.__code__ or repr(f.__defaults__) != repr(g.__defaults__):
        return f is g is None and _equal(x, y)
    return all(map(_equal, _closed_over(f), _closed_over(g)))


def _equal(x: Any, y: Any) -> bool:
    code = getattr(x, "__code__", None)
    if code is not None:
        result: bool = code == getattr(y, "__code__", None)
        return result
    return x is y or (type(x) is type(y) and repr(x) == repr(y))


def _function(x: Any) -> types.FunctionType | None:
    """The function inside a method or property."""
    for name in ("fget", "func", "__func__"):
        x = getattr(x, name, x)
    return x if isinstance(x, types.FunctionType) else None


def _closed_over(f: types.FunctionType) -> list[Any]:
    """What a function sees of the functions around it, but for its own class."""
    cells = zip(f.__code__.co_freevars, f.__closure__ or ())
    return [_contents(cell) for name, cell in cells if name != "__class__"]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None
