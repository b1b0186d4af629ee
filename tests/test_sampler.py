"""The order of examples: each once an epoch, within the budget, and a pure function of data, seed and epoch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encdec_cli.data import bands
from encdec_cli.data.bands import by_length
from encdec_cli.data.sampler import Sampler, splitmix64
from encdec_cli.errors import DataError, UsageError
from tests.reliability import figures
from tests.reliability.bench import Bench


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
    source, target = np.array(pairs).T + 1
    batches: list[list[tuple[int, int]]] = [[]]
    for number in by_length(source, target, tokens).tolist():
        longer = [*batches[-1], pairs[number]]
        if len(longer) * (max(max(pair) for pair in longer) + 1) > tokens:
            batches.append([pairs[number]])
        else:
            batches[-1] = longer
    plan = Sampler(source - 1, target - 1, tokens, "data", 1).batches(0)
    assert sorted(sorted(pairs[number] for number in batch) for batch in plan) == sorted(map(sorted, batches))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=40), st.integers(13, 60))
def test_bands_are_those_with_the_least_padding(pairs, tokens):
    """Of all ways to cut the target lengths into bands, by brute force."""
    source, target = np.array(pairs).T
    order = by_length(source, target, tokens)
    assert sorted(order.tolist()) == list(range(len(pairs)))
    runs = [pair for pair, _ in itertools.groupby(pairs[number] for number in order)]
    assert len(runs) == len(set(runs))  # equally long examples stand together
    lengths = np.unique(target)
    ways = (subset for count in range(len(lengths)) for subset in itertools.combinations(lengths[1:].tolist(), count))
    least = min(of_bands(source, target, way, tokens) for way in ways)
    assert of_bands(source, target, bands._bands(source, target, tokens).tolist(), tokens) == least


def of_bands(source: np.ndarray, target: np.ndarray, starts: Sequence[int], tokens: int) -> int:
    band = np.searchsorted(starts, target, side="right") if len(starts) else np.zeros(len(target), int)
    return sum(bands._padding(*sides_of(source[band == b], target[band == b]), tokens) for b in np.unique(band))


def sides_of(source: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort((source, target))
    return source[order], target[order]


def test_the_padding_of_a_band_is_that_of_its_batches():
    source, target = np.array([5, 2, 3, 4]), np.array([1, 2, 2, 1])
    # Sorted by source and cut at 8 tokens: sources 2 and 3, 4 alone, 5 alone.
    assert bands._padding(source, target, 8) == 1
    # Cut at 10: 2, 3 and then 4, 5: one more in each source.
    assert bands._padding(source, target, 10) == 2


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


def test_ranks_share_one_order_wherever_they_are_resumed(tmp_path):
    bench = Bench(tmp_path, 1, 0.1)
    with closing(bench.forks):
        assert not [problem for _, problem in figures.order(bench) if problem]


@pytest.mark.parametrize("window", [150, 1_000_000])
def test_an_epoch_border_in_the_middle_of_an_update(window):
    plan = sampler(window=window)
    taken = [batch for update in take(plan, 2 * len(plan), accumulate=3) for batch in update]
    for epoch in range(6):
        part = taken[epoch * len(plan) : (epoch + 1) * len(plan)]
        assert sorted(itertools.chain(*part)) == list(range(500))
    assert plan.place(len(plan), accumulate=3) == (3, 0)


def padding(plan: Sampler, *sides: np.ndarray) -> float:
    padded = sum(len(batch) * (side[batch].max() + 1) for batch in plan.batches(2) for side in sides)
    return 1 - sum((side + 1).sum() for side in sides) / padded


def test_padding_is_small():
    source, target = lengths(20_000)
    bands_ = padding(sampler(20_000, 4096), source, target)
    assert bands_ < 0.08  # at random it would be more than 0.6
    order = np.lexsort((np.where(target % 2 == 0, source, -source), target))
    cuts = bands.cut(np.maximum(source, target)[order] + 1, 4096)
    rows = [order[begin:end] for begin, end in itertools.pairwise(cuts)]
    padded = sum(len(some) * (side[some].max() + 1) for some in rows for side in (source, target))
    assert bands_ < 0.8 * (1 - (source + target + 2).sum() / padded)  # than each target length by itself
    assert padding(sampler(20_000, 1000, window=5000), source, target) < 0.07


def test_an_example_over_the_budget_is_named():
    with pytest.raises(
        UsageError, match=r"train\.tokens: 20 .* example 2 .* 31 tokens; set train\.tokens to at least 31"
    ):
        Sampler(np.array([3, 30]), np.array([3, 4]), 20, "data", 1)


def test_no_example_is_an_error():
    with pytest.raises(DataError, match="no training example"):
        Sampler(np.zeros(0, np.int32), np.zeros(0, np.int32), 20, "data", 1)
