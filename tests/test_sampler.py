"""The order of examples: each once an epoch, within the budget, and a pure function of data, seed and epoch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec_cli.data.sampler import Sampler, splitmix64
from encdec_cli.errors import DataError, UsageError


def lengths(count: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Lengths as in real text: log-normal, targets near their sources."""
    random = np.random.default_rng(seed)
    source = np.clip(random.lognormal(2.7, 0.5, count), 1, 200).astype(np.int32)
    target = np.clip(source * random.normal(1, 0.2, count), 1, 200).astype(np.int32)
    return source, target


def sampler(count: int = 500, tokens: int = 600, data: str = "data", seed: int = 1, window: int = 1_000_000) -> Sampler:
    return Sampler(*lengths(count), tokens, data, seed, window)


def take(sampler: Sampler, updates: int, **where: int) -> list[list[list[int]]]:
    return [[batch.tolist() for batch in update] for update in itertools.islice(sampler.updates(**where), updates)]


def as_lists(batches: list[np.ndarray]) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


def test_splitmix64_gives_the_published_numbers():
    assert splitmix64(1234567, 3).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(2**64 - 1, 1000).tolist() == [reference(2**64 - 1, n) for n in range(1, 1001)]


def reference(state: int, number: int) -> int:
    z = (state + number * 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


sizes = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=1, max_size=80)


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(31, 200), st.integers(0, 3), st.sampled_from([7, 1_000_000]))
def test_each_example_once_and_never_over_the_budget(pairs, tokens, epoch, window):
    source, target = np.array(pairs).T
    batches = Sampler(source, target, tokens, "data", 1, window).batches(epoch)
    assert sorted(itertools.chain(*(batch.tolist() for batch in batches))) == list(range(len(pairs)))
    for batch in batches:
        assert len(batch) * (max(source[batch].max(), target[batch].max()) + 1) <= tokens


@settings(max_examples=50, deadline=None)
@given(sizes, st.integers(31, 200))
def test_batches_are_cut_as_by_going_through_the_sorted_examples_one_by_one(pairs, tokens):
    batches: list[list[tuple[int, int]]] = [[]]
    for pair in sorted(pairs, key=lambda pair: (pair[1], pair[0] if pair[1] % 2 == 0 else -pair[0])):
        longer = [*batches[-1], pair]
        if len(longer) * (max(max(pair) for pair in longer) + 1) > tokens:
            batches.append([pair])
        else:
            batches[-1] = longer
    plan = Sampler(*np.array(pairs).T, tokens, "data", 1).batches(0)
    assert sorted(sorted(pairs[number] for number in batch) for batch in plan) == sorted(map(sorted, batches))


def test_the_order_is_a_pure_function_of_data_seed_and_epoch():
    first = sampler()
    first.batches(5)  # what was asked before changes nothing
    order = as_lists(first.batches(0))
    assert as_lists(sampler().batches(0)) == order
    assert as_lists(Sampler(*(x.astype(np.int64) for x in lengths(500)), 600, "data", 1).batches(0)) == order
    others = (sampler(data="other").batches(0), sampler(seed=2).batches(0), sampler(seed=-1).batches(0))
    orders = [order, *map(as_lists, others), as_lists(first.batches(1))]
    assert all(one != another for one, another in itertools.combinations(orders, 2))


def test_the_order_is_the_same_on_every_machine_and_in_every_version():
    """The integers of the definition, worked by plain Python: no numpy stream, no unstable sort."""
    source, target = [3, 1, 3, 2, 3, 1], [2, 2, 2, 2, 2, 1]
    batches = Sampler(np.array(source), np.array(target), 12, "d", 7).batches(4)
    import hashlib

    def keys(text: str, count: int) -> list[int]:
        state = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
        return [reference(state, number + 1) for number in range(count)]

    chance = keys("d|7|4|examples", 6)
    # Target 1, then target 2 with its sources rising; three examples of length 3 + EOS fill a batch of 12.
    three = sorted([0, 2, 4], key=lambda number: chance[number])
    cut = [[5, 1, 3], three]
    turn = keys("d|7|4|batches", 2)
    expected = [cut[number] for number in sorted(range(2), key=lambda number: turn[number])]
    assert [batch.tolist() for batch in batches] == expected


def test_an_epoch_mixes_batches_and_equally_long_examples():
    ones = np.ones(1000, dtype=np.int32)
    plain = Sampler(ones, ones, 200, "data", 1)
    first, second = plain.batches(0), plain.batches(1)
    assert {tuple(sorted(batch)) for batch in first}.isdisjoint(tuple(sorted(batch)) for batch in second)
    mixed = sampler(2000)
    longest = [mixed._target[batch].max() for batch in mixed.batches(0)]
    assert longest != sorted(longest)
    assert longest != [mixed._target[batch].max() for batch in mixed.batches(1)]


@pytest.mark.parametrize("window", [150, 1_000_000])
def test_resuming_at_any_update_goes_on_as_if_never_stopped(window):
    plan = sampler(window=window)
    straight = take(plan, 3 * len(plan) // 2, accumulate=2)
    assert len(straight) * 2 > 2 * len(plan)  # well into the third epoch
    for step in range(len(straight)):
        assert take(sampler(window=window), 2, step=step, accumulate=2)[0] == straight[step]


@pytest.mark.parametrize("window", [150, 1_000_000])
def test_an_epoch_border_in_the_middle_of_an_update(window):
    plan = sampler(window=window)
    taken = [batch for update in take(plan, 2 * len(plan), accumulate=3) for batch in update]
    for epoch in range(6):
        part = taken[epoch * len(plan) : (epoch + 1) * len(plan)]
        assert sorted(itertools.chain(*part)) == list(range(500))
    assert plan.place(len(plan), accumulate=3) == (3, 0)


def padding(plan: Sampler, side: np.ndarray) -> float:
    padded = sum(len(batch) * (side[batch].max() + 1) for batch in plan.batches(2))
    return 1 - (side + 1).sum() / padded


def test_padding_is_small():
    source, target = lengths(20_000)
    plan = sampler(20_000, 4096)
    assert padding(plan, target) < 0.03
    assert padding(plan, source) < 0.20  # at random it would be more than 0.6
    assert padding(sampler(20_000, 1000, window=5000), target) < 0.05


def test_an_example_over_the_budget_is_named():
    with pytest.raises(
        UsageError, match=r"train\.tokens: 20 .* example 2 .* 31 tokens; set train\.tokens to at least 31"
    ):
        Sampler(np.array([3, 30]), np.array([3, 4]), 20, "data", 1)


def test_no_example_is_an_error():
    with pytest.raises(DataError, match="no training example"):
        Sampler(np.zeros(0, np.int32), np.zeros(0, np.int32), 20, "data", 1)
