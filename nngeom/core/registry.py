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

    A class that is defined again by the same code (a notebook cell run twice) takes the place of the first; by other code
    it is another class, and their common name belongs to neither.
    """

    def __init__(self) -> None:
        self._named: dict[str, list[Any]] = {}

    def add(self, cls: Any) -> None:
        """Remember a class; it need not be finished yet."""
        name = qualified(cls)
        self._named[name] = [*self._under(name), cls]

    def __iter__(self) -> Iterator[str]:
        """Short names."""
        return iter(sorted({cls.__name__ for cls in self.classes()}))

    def classes(self) -> Iterator[Any]:
        """All of them."""
        return (cls for classes in self._named.values() for cls in classes)

    def __getitem__(self, name: str) -> T:
        """The class of a qualified or short name; raises :class:`KeyError` for none, :class:`ArgumentError` for several."""
        return self._only(name, self._under(name) or self._short(name))

    def find(self, name: str, full: str | None) -> T:
        """The class that a file calls ``name`` and, unless it is an old one, ``full``: qualified. Errors as above.

        Classes of the library may have moved within it, and those of a script are found where it is imported.
        """
        if full is None or self._named.get(full):
            return self[full or name]
        same = self._short(name)
        if full.startswith(LIBRARY):
            same = [cls for cls in same if qualified(cls).startswith(LIBRARY)]
        elif same and not full.startswith("__main__."):
            raise ArgumentError(
                f"{full!r} is not imported, and {_listed(same)} is another class of that name; import the module of the first"
            )
        return self._only(full, same)

    def is_known(self, cls: Any) -> bool:
        """Whether ``cls`` was added, and is what its qualified name means now."""
        return self._named.get(qualified(cls), [None])[-1] is cls

    def _under(self, name: str) -> list[Any]:
        """The different classes of a qualified name."""
        classes = self._named.get(name, [])
        return [cls for j, cls in enumerate(classes) if not any(_same(cls, later) for later in classes[j + 1 :])]

    def _short(self, name: str) -> list[Any]:
        return [cls for full in self._named for cls in self._under(full) if cls.__name__ == name]

    def _only(self, name: str, found: list[Any]) -> T:
        if len(found) > 1:
            raise ArgumentError(
                f"{name!r} is the name of {len(found)} classes, {_listed(found)}; rename one, or import one only"
            )
        if not found:
            raise KeyError(name)
        return found[0]


def qualified(cls: Any) -> str:
    """``module.qualname``."""
    return f"{cls.__module__}.{cls.__qualname__}"


def _listed(classes: list[Any]) -> str:
    return " and ".join(map(_described, classes))


def _described(cls: Any) -> str:
    """Its qualified name and where it was written, which alone tells two of one name apart."""
    codes = [f.__code__ for f in map(_function, vars(cls).values()) if f is not None and f.__module__ == cls.__module__]
    return qualified(cls) + (f" ({codes[0].co_filename}:{codes[0].co_firstlineno})" if codes else "")


# parts of a class that say nothing of its code; a dataclass with slots is made twice, the second time with the last three
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
    f, g = _function(x), _function(y)
    if f is None or g is None:
        return x is y or (type(x) is type(y) and repr(x) == repr(y))
    return (
        f.__code__ == g.__code__ and repr(f.__defaults__) == repr(g.__defaults__) and _closed_over(f) == _closed_over(g)
    )


def _function(x: Any) -> types.FunctionType | None:
    """The function inside a method or property."""
    for name in ("fget", "func", "__func__"):
        x = getattr(x, name, x)
    return x if isinstance(x, types.FunctionType) else None


def _closed_over(f: types.FunctionType) -> list[tuple[str, str]]:
    """What a function sees of the functions around it, but for its own class."""
    return [
        (name, _contents(cell))
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or ())
        if name != "__class__"
    ]


def _contents(cell: types.CellType) -> str:
    try:
        return repr(cell.cell_contents)
    except ValueError:  # not filled yet
        return ""
