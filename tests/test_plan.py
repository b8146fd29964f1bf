"""The plan of packed rows: every record once an epoch, budgets kept, the same whoever continues it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.data.config import MixtureWarmup, PackingConfig, SourceWeight
from vl_jax.data.stream import shuffle
from vl_jax.data.stream.lengths import Lengths, concatenate
from vl_jax.data.stream.mixture import Mixture
from vl_jax.data.stream.packing import balanced, fill_rows
from vl_jax.data.stream.plan import Cursor, Draw, Planner, choose

LIMITS = st.tuples(st.integers(20, 200), st.integers(1, 9), st.integers(10, 60))


def lengths_of(count: int, seed: int, *, faults: float = 0.0) -> Lengths:
    """Made-up lengths: trunks up to 30, up to four turns of up to 20 tokens, up to three tiles."""
    rng = np.random.default_rng(seed)
    turns = rng.integers(1, 5, count)
    total = int(turns.sum())
    return Lengths(
        trunk=rng.integers(1, 30, count).astype(np.int32),
        trunk_targets=np.zeros(count, np.int32),
        tiles=rng.integers(0, 4, count).astype(np.int32),
        fault=(rng.random(count) < faults).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(turns)]).astype(np.int64),
        turns=rng.integers(2, 20, total).astype(np.int32),
        targets=rng.integers(1, 9, total).astype(np.int32),
        answers=rng.integers(0, 3, total).astype(np.uint32),
        reasons=("corrupt_image",),
    )


def planner(sizes, *, limits=(120, 6, 40), weights=None, seed=0, faults=0.1, window=50, **options) -> Planner:
    row = PackingConfig(max_tokens=limits[0], max_tiles=limits[1], max_answer_tokens=limits[2], window=window)
    mixture = Mixture(sizes, weights or dict.fromkeys(sizes, 1.0), seed=seed)
    lengths = {name: lengths_of(n, i, faults=faults) for i, (name, n) in enumerate(sizes.items())}
    return Planner(mixture, lengths, {}, Draw(*limits, **options), row, seed=seed)


def windows(plan: Planner, count: int, cursor: Cursor | None = None):
    cursor = plan.begin(cursor or Cursor())
    for _ in range(count):
        yield cursor, plan.plan(cursor)
        cursor = plan.advance(cursor)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 64, 1000])
def test_a_shuffle_holds_every_number_once_and_differs_by_key(size):
    shuffles = [shuffle.shuffled(np.arange(size), size, key) for key in range(20)]
    assert all(sorted(s) == list(range(size)) for s in shuffles)
    assert size < 10 or len({tuple(s) for s in shuffles}) == 20


def test_first_places_of_a_shuffle_are_about_uniform():
    found = Counter(shuffle.shuffled(np.full(4000, 3), 10, np.arange(4000)).tolist())
    assert len(found) == 10 and all(abs(n - 400) < 100 for n in found.values())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 200), LIMITS, st.integers(0, 2**31))
def test_rows_hold_every_item_once_within_the_budgets(count, limits, seed):
    rng = np.random.default_rng(seed)
    limits = np.array(limits)
    sizes = np.stack([rng.integers(1, 1 + limit, count) for limit in limits], 1).reshape(count, 3)
    sizes[:, 1] *= rng.random(count) < 0.7
    rows = fill_rows(sizes, limits)
    assert sorted(int(i) for row in rows for i in row) == list(range(count))
    assert all((sizes[row].sum(0) <= limits).all() and len(row) for row in rows)


def test_neighbouring_rows_share_the_cost_evenly():
    costs = np.random.default_rng(0).exponential(size=400)
    ordered = costs[balanced(costs, key=shuffle.mix(1))]
    shuffled = np.random.default_rng(1).permutation(costs)
    even, random = (c.reshape(-1, 20).sum(1).std() for c in (ordered, shuffled))
    assert even < 0.7 * random


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@settings(max_examples=8, deadline=None)
@given(SIZES, LIMITS, st.integers(20, 90), st.integers(0, 99), st.data())
def test_an_epoch_has_every_record_once(sizes, limits, window, seed, data):
    named = {f"s{i}": n for i, n in enumerate(sizes)}
    weights = {name: data.draw(st.floats(0.2, 3)) for name in named}
    plan = planner(named, limits=limits, window=window, weights=weights, seed=seed)
    records: dict[str, dict[int, int]] = {name: {} for name in named}  # by the number of the draw
    cursor = plan.begin(Cursor())
    while any(cursor.taken[name] < 2 * n for name, n in named.items()):
        made = plan.plan(cursor)
        for row in made.rows:
            tokens, tiles = sum(i.tokens for i in row), sum(i.tiles for i in row)
            assert 0 < tokens <= limits[0] and tiles <= limits[1]
            for item in row:
                assert records[item.source].setdefault(item.number, item.record) == item.record
        read = sum(len(row) for row in made.rows)
        assert read + len(made.skipped) == sum(cursor.drawn.values())
        # A skipped record is part of the sequence: it stands where its draw is missing among the others.
        following = plan.advance(cursor)
        left = Counter((source, record) for source, record, _ in made.skipped)
        for name in named:
            drawn = plan.mixture.draws(name, cursor.taken[name], cursor.drawn[name])
            for number, record in zip(drawn.numbers.tolist(), drawn.records.tolist(), strict=True):
                if number not in records[name]:
                    left[name, record] -= 1
                    records[name][number] = record
        assert not any(left.values())
        cursor = following
    for name, n in named.items():
        for epoch in range(2):
            assert sorted(records[name][epoch * n + i] for i in range(n)) == list(range(n))


def test_a_plan_follows_from_seed_and_cursor_alone():
    options = {"sampling": "balanced", "max_turns": 2}
    a, b, other = (planner({"x": 80, "y": 30}, seed=s, **options) for s in (1, 1, 2))
    first = list(windows(a, 5))
    for cursor, made in reversed(first):
        state = json.loads(json.dumps(dataclasses.asdict(cursor)))
        assert b.plan(Cursor.from_state(state)) == made
    assert [m for _, m in windows(other, 5)] != [m for _, m in first]


def test_other_weights_go_on_without_a_repeat():
    sizes = {"x": 90, "y": 90}
    before, after = (planner(sizes, weights={"x": w, "y": 1.0}, faults=0.0) for w in (1.0, 3.0))
    *_, (cursor, _) = windows(before, 2)
    kept = dataclasses.replace(cursor, row=3)
    assert after.plan(after.begin(kept)) == before.plan(kept)  # the window that was begun stays as it was
    drawn: dict[str, list[int]] = {"x": [], "y": []}
    for _, made in [*windows(before, 1), *windows(after, 4, cursor)]:
        for item in (i for row in made.rows for i in row):
            drawn[item.source].append(item.number)
    for numbers in drawn.values():
        assert sorted(numbers) == list(range(len(numbers)))
    assert len(drawn["x"]) > 1.8 * len(drawn["y"]) > 0


def test_shares_move_along_their_line():
    warmup = MixtureWarmup(1000, (SourceWeight("text", 1.0),))
    mixture = Mixture({"text": 9, "image": 9}, {"text": 1.0, "image": 3.0}, seed=0, warmup=warmup)
    windows = [mixture.quota(start, start + 100) for start in range(0, 2000, 100)]
    shares = [w["image"] / 100 for w in windows]
    assert np.allclose(shares[:10], 0.75 * (np.arange(10) + 0.5) / 10, atol=0.02)
    assert np.allclose(shares[10:], 0.75, atol=0.02)
    assert abs(sum(sum(w.values()) for w in windows) - 2000) <= 2


def test_rare_sources_are_drawn_at_their_rate():
    mixture = Mixture({"a": 5, "b": 5}, {"a": 1.0, "b": 0.001}, seed=0)
    assert sum(mixture.quota(w * 64, (w + 1) * 64)["b"] for w in range(200)) == int(64 * 200 * 0.001 / 1.001)


@pytest.mark.parametrize("sampling", ["first", "uniform", "balanced"])
def test_draws_of_turns_keep_their_rule(sampling):
    lengths = lengths_of(300, 3)
    keys = shuffle.mix(np.arange(300))
    drawn = choose(lengths, keys, Draw(10**6, 10**6, 10**6, max_turns=2, sampling=sampling))
    everything = choose(lengths, keys, Draw(10**6, 10**6, 10**6, sampling=sampling))
    counts = np.diff(lengths.offsets)
    for i, turns in enumerate(drawn.turns):
        assert turns == everything.turns[i][:2] and sorted(everything.turns[i]) == list(range(counts[i]))
        start = lengths.offsets[i]
        assert drawn.sizes[i, 0] == lengths.trunk[i] + sum(lengths.turns[start + t] for t in turns)
        if sampling == "first":
            assert turns == tuple(range(len(turns)))
        if sampling == "balanced" and len(set(lengths.answers[start : start + counts[i]])) > 1:
            assert lengths.answers[start + turns[0]] != lengths.answers[start + turns[1]]
    if sampling != "first":
        assert 0.35 < np.mean([t[0] == 0 for t, n in zip(drawn.turns, counts, strict=True) if n == 2]) < 0.65


def test_turns_that_do_not_fit_are_left_out_and_samples_that_do_not_are_skipped():
    one = lengths_of(1, 0)
    sized = dataclasses.replace(
        one, trunk=np.array([10]), tiles=np.array([2]), fault=np.array([0]), turns=np.array([5, 20, 1, 1]),
        offsets=np.array([0, 4]), targets=np.array([2, 2, 2, 2]), answers=np.zeros(4, np.uint32),
    )  # fmt: skip
    key = shuffle.mix(np.array([1]))
    assert choose(sized, key, Draw(30, 2, 9)).turns == [(0,)]
    assert choose(sized, key, Draw(35, 2, 9)).turns == [(0, 1)]
    cases = {"too_long": (14, 2, 9), "too_many_tiles": (50, 1, 9), "too_many_targets": (50, 2, 7)}
    assert {choose(sized, key, Draw(*limits)).faults[0] for limits in cases.values()} == set(cases)


def test_lengths_can_be_taken_and_joined():
    a, b = lengths_of(20, 1, faults=0.5), lengths_of(7, 2, faults=0.5)
    b = dataclasses.replace(b, reasons=("too_long",))
    both = concatenate([a, b])
    again = concatenate([both.take(np.arange(20)), both.take(np.arange(20, 27))])
    for name in ("trunk", "tiles", "fault", "offsets", "turns", "answers"):
        np.testing.assert_array_equal(getattr(both, name), getattr(again, name))
    picked = both.take(np.array([25, 3]))
    assert picked.turns.tolist() == [*b.take(np.array([5])).turns, *a.take(np.array([3])).turns]
    assert both.faults == {**a.faults, **{20 + r: reason for r, reason in b.faults.items()}}


@pytest.mark.parametrize("state", [None, {}, {"window": -1, "row": 0, "taken": {}, "drawn": {}}])
def test_a_wrong_cursor_is_refused(state):
    with pytest.raises(ValueError, match="cursor"):
        Cursor.from_state(state)


@pytest.mark.slow
def test_a_million_samples_are_planned_in_seconds():
    plan = planner({"x": 1_000_000}, limits=(1024, 24, 1024), window=4096)
    start, rows, items = time.process_time(), 0, 0
    for _, made in windows(plan, 20):
        rows, items = rows + len(made.rows), items + sum(map(len, made.rows))
    seconds = (time.process_time() - start) * 1e6 / (20 * 4096)
    print(f"1 M samples in {seconds:.1f} s, {items / rows:.1f} a row")
    assert seconds < 60
