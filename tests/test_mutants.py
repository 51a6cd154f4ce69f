"""The script that changes the library at random: its changes are programs, other ones, and the same for a seed."""

import mutants

SOURCE = '''
"""Text with 1 + 1."""
from a import b

def f(x: int = 3, y: "1 < 2" = None):
    """More text, not x."""
    if x < 1 and not y:
        raise ValueError(f"x is {x + 1}")
    z = x.T @ y - 2.0 * x
    z += 1
    é = z is not None or x in y  # 1 > 2
    return -z if True else (x) + (y) // 3


class C:
    def __repr__(self):
        return 1 + 1
'''


def test_changes_are_other_programs():
    lines, made = SOURCE.splitlines(), set()
    for change, line, scope in mutants.changes(SOURCE):
        changed = change.applied(SOURCE)
        assert mutants.differs(changed, SOURCE) and scope == "f"
        differing = [(a, b) for a, b in zip(lines, changed.splitlines()) if a != b]
        assert len(differing) == 1 and lines[line - 1] == differing[0][0]
        made.add(differing[0][1].strip())
    expected = {
        "if x > 1 and not y:",
        "if x <= 1 and not y:",
        "if x < 1 or not y:",
        "if x < 1 and (y):",
        "if x < 2 and not y:",
        "if (not (x < 1 and not y)):",
        "z = x @ y - 2.0 * x",
        "z = (x.T).mT @ y - 2.0 * x",
        "z = x.T @ (y).mT - 2.0 * x",
        "z = x.T @ y + 2.0 * x",
        "z = x.T @ y - 2.0 / x",
        "z = x.T @ y - 4.0 * x",
        "z -= 1",
        "z += 2",
        "é = z is None or x in y  # 1 > 2",
        "é = z is not None and x in y  # 1 > 2",
        "é = z is not None or x not in y  # 1 > 2",
        "return (z) if True else (x) + (y) // 3",
        "return -z if (not (True)) else (x) + (y) // 3",
        "return -z if False else (x) + (y) // 3",
        "return -z if True else (x) - (y) // 3",
        "return -z if True else (x) + (y) * 3",
        "return -z if True else (x) + (y) // 4",
        'def f(x: int = 4, y: "1 < 2" = None):',
    }
    assert made == expected


def test_a_seed_draws_the_same_mutants_and_likely_tests_come_first():
    first, second = mutants.draw(30, 7), mutants.draw(30, 7)
    assert first == second and len({m.changed for m in first}) == 30 and first != mutants.draw(30, 8)
    for m in first[:10]:
        compile(m.changed, m.file, "exec")
        assert m.diff().count("\n+") == 2 or m.diff().count("\n-") >= 2
        assert sorted(mutants.ordered_tests(m)) == sorted(
            str(p.relative_to(mutants.ROOT)) for p in (mutants.ROOT / "tests").rglob("test_*.py")
        )
    statistic = mutants.draw(1, 0, only="core/statistic.py")[0]
    assert "tests/test_statistics.py" in mutants.ordered_tests(statistic)[:3]
    gradients = mutants.draw(1, 0, only="optim/gradients.py")[0]
    assert "tests/test_optim_gradients.py" in mutants.ordered_tests(gradients)[:3]


def test_faults_go_into_folders_that_are_there():
    assert all(list((mutants.ROOT / "nngeom" / folder).glob("*.py")) for folder in mutants.FOLDERS)
