"""House rule: every argument of a public callable is named in its docstring, those that measures share in one place."""

import inspect
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "docs"))
import public


def methods(cls: type) -> dict[str, object]:
    """The public methods of a class that this library wrote, each as it is called."""
    out = {}
    for name in dir(cls):
        f = inspect.unwrap(getattr(inspect.getattr_static(cls, name), "__func__", inspect.getattr_static(cls, name)))
        if not name.startswith("_") and inspect.isfunction(f) and f.__module__.startswith("nngeom."):
            out[name] = getattr(cls, name)
    return out


def callables() -> dict[str, object]:
    """Everything public that is called: functions, constructors, methods."""
    names = {*public.entries(), *(f"{p}.{n}" for p in public.PACKAGES for n in public.resolve(f"{p}.__all__"))}
    out = {}
    for name in sorted(names):
        x = public.resolve(name)
        if callable(x):
            out[name] = x
        if inspect.isclass(x):
            out |= {f"{name}.{method}": f for method, f in methods(x).items()}
    return out


CALLABLES = callables()


def test_public_callables_are_documented():
    assert [name for name, f in CALLABLES.items() if not inspect.getdoc(f)] == []


def test_every_argument_is_named():
    unnamed = {}
    for name, f in CALLABLES.items():
        doc, names = inspect.getdoc(f) or "", public.parameters(f)
        left = [p for p in names if p not in public.named(doc) and p not in public.shared(names, doc)]
        unnamed |= {name: left} if left else {}
    assert unnamed == {}, "say what these are, in ``double backticks`` or in an Args: list"


def test_listed_arguments_exist():
    odd = {}
    for name, f in CALLABLES.items():
        left = set(public.arguments(inspect.getdoc(f) or "")) - set(public.parameters(f))
        odd |= {name: left} if left else {}
    assert odd == {}, "these are gone: take them out of the Args: list"


def test_shared_arguments_are_described_once():
    assert set(public.arguments(public.home())) >= public.SHARED


def test_shared_arguments_join_every_measure():
    import nngeom as nng

    page = public.spliced(public.parameters(nng.GGN), inspect.getdoc(nng.GGN))
    assert list(public.arguments(page)) == public.parameters(nng.GGN), "in the order of the signature"
    assert page.count("Args:") == 1 and "other arguments" in page.lower()
    plain = public.spliced(["model"], "Told.\n\nRaises :class:`ModeError`.")
    assert plain.startswith("Told.\n\nArgs:\n    model: ") and plain.endswith("\n\nRaises :class:`ModeError`.")
    assert public.spliced(["x"], "Told.") == "Told."


def test_lists_become_fields():
    doc = "Told.\n\nArgs:\n    x: one.\n    y: two,\n        and more.\n\nRaises nothing."
    assert public.as_fields(doc) == "Told.\n\n:param x: one.\n:param y: two,\n        and more.\n\nRaises nothing."
    assert public.as_fields("Told.") == "Told."
