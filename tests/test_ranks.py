"""What processes say and send, without a second process: assignment, buckets, messages, fingerprints, data warnings."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

import nngeom as nng
from nngeom.core.kept import Kept, union
from nngeom.core.statistic import Moment, Stacked, Sums
from nngeom.ranks import buckets, messages
from nngeom.ranks.data import warn_of_repeats, warn_of_same
from nngeom.ranks.fingerprint import bits, described, difference, digest_of
from nngeom.ranks.made import assigned
from nngeom.ranks.merged import told
from nngeom.ranks.team import ALONE


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_assignment_is_within_the_longest_first_bound(costs, size):
    """Graham 1969: at most 4/3 of the best, which is at least the mean and the largest."""
    owners = assigned(dict(enumerate(costs)), size)
    loads = [sum(c for j, c in enumerate(costs) if owners[j] == r) for r in range(size)]
    ordered = sorted(costs, reverse=True)
    pair = ordered[size - 1] + ordered[size] if len(costs) > size else 0
    assert list(owners) == list(range(len(costs)))
    assert max(loads) <= 4 / 3 * max(sum(costs) / size, ordered[0], pair) * (1 + 1e-9)


class Done:
    def wait(self):
        return None


@pytest.mark.parametrize("limit", [1, 7, 64, 10**6])
def test_buckets_bring_everything_back(monkeypatch, limit):
    monkeypatch.setitem(buckets.BYTES, "cpu", 8 * limit)
    torch.manual_seed(0)
    square = torch.randn(9, 9, dtype=torch.float64)
    given = [
        torch.randn(3, 5),
        square[2:5, 2:],
        square[5:, 5:],
        torch.zeros(0, 3),
        torch.randn(4, 4, dtype=torch.float64).T,
    ]
    expected = [3 * t for t in given]
    untouched = square[:2].clone()
    sent = []

    def triple(flat):
        sent.append((flat.dtype, flat.numel()))
        flat.mul_(3)
        return Done()

    buckets.through(given, triple)
    for t, e in zip(given, expected):
        torch.testing.assert_close(t, e)
    assert torch.equal(square[:2], untouched)
    assert {dtype for dtype, _ in sent} == {torch.float32, torch.float64}
    assert len(sent) == 2 or limit < 10**6


def test_messages_come_back():
    x = {"a": (1, "b"), "c": [None] * 400}
    m = messages.message(x)
    assert messages.length(messages.padded(m, 16)) == len(m) and messages.content(m) == x
    tensors = {"w": torch.arange(3.0), "deep": [(torch.ones(2), 5)]}
    rest, parts = messages.taken_apart(tensors)
    assert len(parts) == 2
    back = messages.put_together(rest, [2 * t for t in parts])
    assert torch.equal(back["w"], 2 * torch.arange(3.0)) and back["deep"][0][1] == 5


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64]
)
def test_bits_tell_any_change(dtype):
    torch.manual_seed(0)
    t = (10 * torch.randn(50)).clamp_min(0).to(dtype)
    other = t.clone()
    at = int((t != t[3]).nonzero()[0])
    other[[3, at]] = other[[at, 3]]
    (a,), (b,), (c,) = bits([t]), bits([t.clone()[torch.arange(50)]]), bits([other])
    assert a == b and a != c
    assert bits([t.view(5, 10).T])[0] != bits([t.view(5, 10)])[0]
    assert bits([]) == []


def test_bits_tell_the_smallest_change_anywhere():
    t = torch.linspace(-1, 1, 2000)
    (whole,) = bits([t])
    for j in (0, 777, 1999):
        other = t.clone()
        other[j] = torch.nextafter(other[j], torch.tensor(torch.inf))
        assert bits([other])[0] != whole


@dataclasses.dataclass
class Options:
    names: frozenset
    kind: type
    weight: torch.Tensor | None = None


def test_descriptions_hold_no_addresses_and_no_order():
    one = described(Options(frozenset("abc"), nng.PMatKFAC, torch.ones(2)))
    assert one == described(Options(frozenset("cba"), nng.PMatKFAC, torch.ones(2)))
    assert one != described(Options(frozenset("abc"), nng.PMatKFAC, torch.zeros(2)))
    assert "0x" not in one and "0x" not in described(object()) and "0x" not in described([test_bits_tell_any_change])
    assert described({"a": 1, "b": 2}) == described({"b": 2, "a": 1})
    assert digest_of(one) == digest_of(one) and len(digest_of(one)) == 16


def test_differences_name_the_ranks():
    assert difference([{"a": "1"}, {"a": "1"}]) is None
    assert difference([{"a": "1"}, {"a": "2"}, {"a": "1"}]) == "a is 1 on ranks 0, 2, 2 on rank 1"
    assert difference([{"a": "1"}, {}]) == "a is 1 on rank 0, not there on rank 1"


def sums(*rows, stacked=False):
    """Sums of second moments of these rows."""

    @dataclasses.dataclass
    class Part:
        examples: int = 2
        first: bool = True

    out = Sums()
    for x in rows:
        out.add(lambda _, x=x: {"block": {"g": Stacked([x]) if stacked else Moment(x)}}, Part())
    return out


def test_upper_halves_are_all_that_is_sent():
    torch.manual_seed(0)
    x, y = torch.randn(40, 300, dtype=torch.float64), torch.randn(40, 300, dtype=torch.float64)
    mine = sums(x)
    mine.adopt(mine.kept(), x.device)
    sent = sum(t.numel() for t in mine.addends())
    assert sent < 0.65 * 300 * 300
    other = sums(y)
    for t, o in zip(mine.addends(), other.addends()):
        t += o
    torch.testing.assert_close(mine.sums["block"]["g"], x.T @ x + y.T @ y)


def test_a_union_of_what_there_is():
    dense, half = Kept((3, 3), torch.float32), Kept((3, 3), torch.float64, half=True)
    kept, odd = union([{("a", "g"): half}, {("b", "g"): dense, ("a", "g"): dense}])
    assert list(kept) == [("a", "g"), ("b", "g")] and not odd
    assert kept["a", "g"] == Kept((3, 3), torch.float64)
    _, odd = union([{("a", "g"): dense}, {("a", "g"): Kept((2, 2), torch.float32)}])
    assert [key for key, _ in odd] == [("a", "g")]
    empty = Sums()
    empty.adopt({("a", "g"): half, ("r", "x"): Kept((4,), torch.float64, stacked=True)}, torch.device("cpu"))
    assert empty.sums["a"]["g"].shape == (3, 3) and empty.stacks()[0].parts[0].shape == (0, 4)


def test_blocks_that_another_process_would_not_know():
    with pytest.raises(nng.UnsupportedError, match="another process does not know"):
        told((0, object()))
    layout = nng.LayerCollection.from_model(torch.nn.Linear(2, 2)).span()
    assert "0x" not in str(told((1, layout))) and told("name") == told("name")


def test_alone_does_what_it_is_told():
    with ALONE.together("work") as note:
        note.mine = 3
    assert note.all == [3] and ALONE.exchange("x", 1) == [1] and ALONE.first("x", 2) == 2
    x = torch.arange(4.0)
    ALONE.sum_([x])
    into = torch.zeros(4)
    ALONE.pass_on([x], [into])
    assert torch.equal(x, torch.arange(4.0)) and torch.equal(into, x) and torch.equal(ALONE.rows(x, [4]), x)
    with pytest.raises(ZeroDivisionError), ALONE.together("work"):
        raise ZeroDivisionError


def test_one_process_is_told_of_groups():
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    for bad in (True, 3, "world", object()):
        with pytest.raises(nng.ArgumentTypeError, match="process_group is"):
            nng.FIM(model, x, process_group=bad)
    assert list(nng.shard(range(5))) == [0, 1, 2, 3, 4]
    with pytest.raises(nng.ArgumentTypeError, match="without length"):
        nng.shard(iter([1]))


def test_index_of_draws():
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    seeded = lambda: torch.Generator().manual_seed(0)
    measure = lambda index: nng.FIM_MonteCarlo(model, [(x,)], nng.PMatDense, generator=seeded(), index=index).to_dense()
    running = measure(None)
    assert torch.equal(measure(lambda batch: torch.arange(4)), running)
    assert torch.equal(measure(lambda batch: [0, 1, 2, 3]), running)
    assert not torch.equal(measure(lambda batch: torch.arange(4) + 9), running)
    flipped = nng.FIM_MonteCarlo(
        model, [(x.flip(0),)], nng.PMatDense, generator=seeded(), index=lambda batch: torch.arange(4).flip(0)
    )
    torch.testing.assert_close(flipped.to_dense(), running)
    for bad, error, said in (
        (3, nng.ArgumentTypeError, "index is 3"),
        (lambda batch: torch.randn(4), nng.ArgumentTypeError, "whole numbers"),
        (lambda batch: "names", nng.ArgumentTypeError, "index returned str"),
        (lambda batch: torch.arange(3), nng.ArgumentError, r"index returned \(3,\); expected \(4,\)"),
    ):
        with pytest.raises(error, match=said):
            measure(bad)
    with pytest.raises(nng.ArgumentError, match="goes with draws"):
        nng.FIM(model, [(x,)], index=lambda batch: torch.arange(4))
    with pytest.raises(nng.ArgumentError, match="goes with draws"):
        nng.FIM(model, [(x,)], nng.PMatDense, centered=True, index=lambda batch: torch.arange(4))


def test_data_that_repeats_or_is_the_same():
    data = TensorDataset(torch.zeros(10, 2))

    class Prepared(BatchSampler):
        """As accelerate's, by what it is asked."""

        even_batches, num_processes, drop_last = True, 2, False

        def __init__(self, size):
            self.batch_sampler = BatchSampler(range(10), size, drop_last=False)

        def __iter__(self):
            return iter(self.batch_sampler)

    with pytest.warns(nng.RepeatedExamplesWarning, match="even_batches"):
        warn_of_repeats(DataLoader(data, batch_sampler=Prepared(4)))
    warn_of_repeats(DataLoader(data, batch_sampler=Prepared(5)))
    warn_of_repeats([torch.zeros(2)])
    warn_of_same([("a", 3)])
    warn_of_same([("a", 3), ("b", 3)])
    warn_of_same([("a", 1), ("a", 1)])
    warn_of_same([(None, 0), (None, 0)])
    with pytest.warns(nng.SameDataWarning):
        warn_of_same([("a", 3), ("a", 3)])
