from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vl_jax.interop.rules import Plan, Rule, export, layout, plan, read
from vl_jax.interop.safetensors import Entry, WeightsError, open_file, write_file
from vl_jax.params import flatten, unflatten

Weights = dict[str, np.ndarray]


def _targets(plan: Plan, dtype: object = np.float32, sharding: object = None) -> dict[str, object]:
    return unflatten(
        {leaf.path: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding) for leaf in plan.leaves}
    )


def _random(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _sources(plan: Plan, seed: int = 0) -> Weights:
    keys = [(key, leaf.source_shape) for leaf in plan.leaves for _, key in leaf.sources()]
    return {key: _random(shape, seed + i) for i, (key, shape) in enumerate(keys)}


# Values worked out by hand, rule by rule.


def _read_one(rule: Rule, shape: tuple[int, ...], weights: Weights, **stacks: tuple[int, ...]) -> np.ndarray:
    path = rule.target.replace("{stack}", next(iter(stacks), ""))
    made = plan([rule], {path: shape}, stacks)
    return np.asarray(flatten(read(made, weights, _targets(made)))[path])


def test_a_linear_layer_is_transposed():
    weight = _random((3, 5))
    assert np.array_equal(_read_one(Rule("w", "kernel", "f d -> d f"), (5, 3), {"w": weight}), weight.T)


def test_merged_heads_are_split():
    weight = _random((6, 5))  # 3 heads of 2
    out = _read_one(Rule("q", "query", "(n h) d -> d n h"), (5, 3, 2), {"q": weight})
    assert np.array_equal(out[:, 1], weight[2:4].T)


def test_experts_parts_and_layers_are_stacked():
    weights = {
        f"layers.{layer}.experts.{expert}.{part}.weight": _random((4, 3), seed)
        for seed, (layer, expert, part) in enumerate(
            (layer, e, p) for layer in (1, 2) for e in range(3) for p in ("gate", "up")
        )
    }
    rule = Rule(
        "layers.{layer}.experts.{expert}.{part}.weight",
        "{stack}/w_in",
        "layer expert part f d -> layer expert d part f",
        ("gate", "up"),
    )
    out = _read_one(rule, (2, 3, 3, 2, 4), weights, moe=(1, 2))
    assert np.array_equal(out[1, 2, :, 0], weights["layers.2.experts.2.gate.weight"].T)
    assert np.array_equal(out[0, 1, :, 1], weights["layers.1.experts.1.up.weight"].T)


def test_interleaved_parts_of_one_tensor_are_separated():
    weight = _random((5, 6))  # columns gate0 up0 gate1 up1 gate2 up2
    out = _read_one(Rule("w", "w_in", "d (f part) -> d part f"), (5, 2, 3), {"w": weight})
    assert np.array_equal(out[:, 1], weight[:, 1::2])


def test_axes_of_size_one_stay_in_the_source():
    weight = _random((1, 4, 1))
    assert np.array_equal(_read_one(Rule("w", "w", "1 d 1 -> d"), (4,), {"w": weight}), weight[0, :, 0])


def test_scalars_have_no_axes():
    assert _read_one(Rule("w", "scale", "->"), (), {"w": np.array(2.5, np.float32)}) == 2.5


def test_a_rule_is_used_for_each_stack_in_the_tree():
    rule = Rule("l.{layer}.w", "{stack}/w", "layer d -> layer d")
    made = plan([rule], {"dense/w": (1, 2), "moe/w": (2, 2)}, {"dense": (0,), "moe": (1, 2), "absent": (3,)})
    weights = {f"l.{i}.w": np.full(2, i, np.float32) for i in range(3)}
    tree = flatten(read(made, weights, _targets(made)))
    assert tree["dense/w"].tolist() == [[0, 0]] and tree["moe/w"].tolist() == [[1, 1], [2, 2]]


def test_layers_of_a_stack_need_not_be_consecutive():
    rule = Rule("l.{layer}.w", "{stack}/w", "layer d -> layer d")
    made = plan([rule], {"even/w": (2, 1), "odd/w": (2, 1)}, {"even": (0, 2), "odd": (1, 3)})
    weights = {f"l.{i}.w": np.full(1, i, np.float32) for i in range(4)}
    assert flatten(read(made, weights, _targets(made)))["odd/w"].tolist() == [[1], [3]]


# Properties.


Case = tuple[tuple[str, str, str, tuple[str, ...]], tuple[int, ...], dict[str, tuple[int, ...]]]


@st.composite
def _rules(draw: st.DrawFn) -> Case:
    """The fields of a rule, the shape of its parameter, and the stacks.

    No ``Rule`` yet: checked annotations draw random numbers, which hypothesis forbids here.
    """
    fields = draw(st.lists(st.sampled_from(["layer", "expert", "part"]), unique=True))
    inner = draw(st.lists(st.sampled_from("abcd"), unique=True))
    sizes = {name: draw(st.integers(1, 3)) for name in (*fields, *inner)}
    stacked = "layer" in fields and draw(st.booleans())
    groups: list[str] = []
    rest = draw(st.permutations(inner))
    while rest:
        count = draw(st.integers(1, len(rest)))
        groups.append(rest[0] if count == 1 else f"({' '.join(rest[:count])})")
        rest = rest[count:]
    for _ in range(draw(st.integers(0, 2))):
        groups.insert(draw(st.integers(0, len(groups))), "1")
    target = draw(st.permutations([*fields, *inner]))
    rule = (
        ".".join(["w", *(f"{{{field}}}" for field in fields)]),
        "model/{stack}/w" if stacked else "model/w",
        f"{' '.join([*fields, *groups])} -> {' '.join(target)}",
        tuple(f"part{i}" for i in range(sizes["part"])) if "part" in fields else (),
    )
    layers = draw(st.permutations(range(5)))[: sizes["layer"]] if stacked else ()
    return rule, tuple(sizes[name] for name in target), {"some": tuple(layers)} if stacked else {}


def _plan_for(
    rule: tuple[str, str, str, tuple[str, ...]], shape: tuple[int, ...], stacks: dict[str, tuple[int, ...]]
) -> Plan:
    made = plan([Rule(*rule)], {rule[1].replace("{stack}", "some"): shape}, stacks)
    assert made.problems == ()
    return made


@settings(max_examples=100, deadline=None)
@given(case=_rules(), seed=st.integers(0, 1000))
@pytest.mark.slow
def test_export_is_the_inverse_of_read(case: Case, seed: int):
    made = _plan_for(*case)
    weights = _sources(made, seed)
    tree = read(made, weights, _targets(made))
    for same in (tree, jax.tree.map(np.asarray, tree)):
        out = dict(export(made, same))
        assert out.keys() == weights.keys()
        for key, array in weights.items():
            assert out[key].shape == array.shape and out[key].tobytes() == array.tobytes()
        assert layout(made, same) == {key: Entry(a.shape, a.dtype) for key, a in out.items()}
        assert list(layout(made, same)) == list(out)


@settings(max_examples=30, deadline=None)
@given(case=_rules(), data=st.data())
@pytest.mark.slow
def test_sharded_read_equals_whole_read(case: Case, data: st.DataObject):
    made = _plan_for(*case)
    # Sizes times 4, so that any axis but a part can be divided; every number of layers still has its key.
    shape = tuple(
        n if name == "part" else 4 * n
        for name, n in zip(made.leaves[0].axes.target, made.leaves[0].shape, strict=True)
    )
    stacks = {name: tuple(range(4 * len(layers))) for name, layers in case[2].items()}
    made = _plan_for(case[0], shape, stacks)
    free = [i for i, n in enumerate(shape) if n % 4 == 0]
    split = data.draw(st.permutations(free)) if free else []
    spec: list[str | None] = [None] * len(shape)
    for i, name in zip(split, data.draw(st.permutations(["x", "y"])), strict=False):
        spec[i] = name
    sharding = NamedSharding(Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y")), PartitionSpec(*spec))
    weights = _sources(made)
    whole, sharded = (
        flatten(read(made, weights, _targets(made, sharding=s)))[made.leaves[0].path]
        for s in (None, sharding)
    )
    assert sharded.sharding == sharding
    assert np.array_equal(np.asarray(whole), np.asarray(sharded))
    assert {k: a.tobytes() for k, a in export(made, unflatten({made.leaves[0].path: sharded}))} == {
        k: a.tobytes() for k, a in weights.items()
    }


class _Counted(Mapping[str, np.ndarray]):
    """Counts how often each tensor is asked for."""

    def __init__(self, weights: Weights):
        self.weights, self.counts = weights, dict.fromkeys(weights, 0)

    def __contains__(self, key: object) -> bool:
        return key in self.weights

    def __getitem__(self, key: str) -> np.ndarray:
        self.counts[key] += 1
        return self.weights[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


EXPERTS = Rule("e.{expert}.w", "w", "expert f d -> expert d f")


def test_a_part_is_read_once_for_all_devices_that_hold_it():
    made = plan([EXPERTS], {"w": (4, 3, 2)})
    sharding = NamedSharding(Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y")), PartitionSpec("x"))
    # Checked annotations look at the first item of a mapping, at every call.
    weights = _Counted({"first": np.zeros(1), **_sources(made)})
    read(made, weights, _targets(made, sharding=sharding), ignored=["first"])
    # Once for its shape and once for its values: not for each of two replicas, nor for other experts.
    assert [weights.counts[f"e.{i}.w"] for i in range(4)] == [2, 2, 2, 2]


# Host memory.

TENSOR = (256, 512)  # 512 KiB


@pytest.fixture
def stacked(tmp_path: Path) -> tuple[Plan, Mapping[str, np.ndarray]]:
    """A leaf of 64 MiB made of 128 tensors, on disk."""
    rule = Rule("l.{layer}.e.{expert}", "w", "layer expert f d -> layer expert d f")
    made = plan([rule], {"w": (8, 16, *TENSOR[::-1])})
    entry = Entry(TENSOR, np.dtype(np.float32))
    keys = [key for _, key in made.leaves[0].sources()]
    arrays = ((key, np.full(TENSOR, i, np.float32)) for i, key in enumerate(keys))
    write_file(tmp_path / "x", dict.fromkeys(keys, entry), arrays)
    return made, open_file(tmp_path / "x")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.slow
def test_memory_peaks_at_the_largest_leaf(stacked: tuple[Plan, Mapping[str, np.ndarray]], sharded: bool):
    made, weights = stacked
    mesh = Mesh(np.array(jax.devices()), ("x",))
    sharding = NamedSharding(mesh, PartitionSpec(None, "x")) if sharded else None
    tracemalloc.start()
    tree = read(made, weights, _targets(made, sharding=sharding))
    peak = tracemalloc.get_traced_memory()[1]
    leaf_bytes = 4 * math.prod(made.leaves[0].shape)
    assert leaf_bytes <= peak < 1.05 * leaf_bytes  # the bookkeeping of 128 tensors is not 5 %
    tracemalloc.stop()
    # Not counted above: what lies on the devices.
    before = _host_copies(tree["w"])
    tracemalloc.start()
    assert all(array[0, 0] == i for i, (_, array) in enumerate(export(made, tree)))
    # A layer and the one before it, and a few tensors; the leaf is 8 layers.
    assert tracemalloc.get_traced_memory()[1] < 2 * leaf_bytes / 8 + 4 * 4 * math.prod(TENSOR)
    tracemalloc.stop()
    assert _host_copies(tree["w"]) == before


def _host_copies(array: jax.Array) -> bool:
    """Whether the array has kept a copy of itself on the host."""
    return array._npy_value is not None  # pyright: ignore[reportAttributeAccessIssue]


# dtypes.


def test_floating_dtypes_are_cast_and_come_back():
    made = plan([EXPERTS], {"w": (2, 3, 4)})
    weights = {key: a.astype(ml_dtypes.bfloat16) for key, a in _sources(made).items()}
    weights["e.1.w"] = weights["e.1.w"].astype(np.float32)
    tree = read(made, weights, _targets(made))
    assert tree["w"].dtype == jnp.float32
    dtypes = {key: a.dtype for key, a in weights.items()}
    out = dict(export(made, tree, dtypes=dtypes))
    assert all(out[k].dtype == a.dtype and out[k].tobytes() == a.tobytes() for k, a in weights.items())
    assert {key: entry.dtype for key, entry in layout(made, tree, dtypes=dtypes).items()} == dtypes


@pytest.mark.parametrize(("found", "wanted"), [("i4", "f4"), ("f4", "i4"), ("i8", "i4"), ("?", "f4")])
def test_other_dtypes_must_be_equal(found: str, wanted: str):
    made = plan([Rule("w", "w", "d -> d")], {"w": (2,)})
    with pytest.raises(WeightsError, match="w: source w has dtype .*, expected"):
        read(made, {"w": np.zeros(2, found)}, _targets(made, wanted))
    assert read(made, {"w": np.ones(2, "i4")}, _targets(made, "i4"))["w"].tolist() == [1, 1]


# Errors.


def test_one_error_lists_everything_that_does_not_fit():
    rules = [EXPERTS, Rule("b", "b", "d -> d"), Rule("c", "c", "d -> d"), Rule("gone", "gone", "d -> d")]
    shapes = {"w": (3, 4, 2), "b": (4,), "c": (4,), "head": (5,)}
    made = plan(rules, shapes)
    weights = _sources(made)
    del weights["e.1.w"]
    weights["e.2.w"] = weights["e.2.w"].T
    weights["b"] = np.zeros(3, np.int32)
    weights |= {"left.over": np.zeros(1), "rotary.0.inv_freq": np.zeros(1), "rotary.x": np.zeros(1)}
    targets = unflatten({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})
    with pytest.raises(WeightsError) as caught:
        read(made, weights, targets, ignored=[r"rotary\.\d+\.inv_freq"])
    assert str(caught.value).splitlines() == [
        "weights do not fit, 7 problems:",
        "head: no rule gives this parameter",
        "w: source e.1.w is missing",
        "w: source e.2.w has shape (4, 2), expected (2, 4)",
        "b: source b has shape (3,), expected (4,)",
        "b: source b has dtype int32, expected float32",
        "left.over: no rule uses this source tensor",
        "rotary.x: no rule uses this source tensor",
    ]


def test_ignored_tensors_are_still_used_where_a_rule_names_them():
    made = plan([Rule("w", "w", "d -> d")], {"w": (2,)})
    assert read(made, {"w": np.ones(2, "f4")}, _targets(made), ignored=[".*"])["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("rules", "shapes", "problem"),
    [
        ([Rule("a", "w", "d -> d"), Rule("b", "w", "d -> d")], {"w": (2,)}, "w: given by two rules, a and b"),
        ([Rule("a", "w", "d -> d"), Rule("a", "v", "d -> d")], {"w": (2,), "v": (2,)}, "a: belongs to both"),
        ([Rule("a", "w", "d f -> f d")], {"w": (2,)}, r"w: shape \(2,\) does not have the axes f d"),
        (
            [Rule("{part}", "w", "part d -> part d", ("a", "b"))],
            {"w": (3, 2)},
            r"w: shape \(3, 2\) has 3 along 'part', the source has \('a', 'b'\)",
        ),
        (
            [Rule("{layer}", "{stack}/w", "layer d -> layer d")],
            {"moe/w": (3, 2)},
            r"moe/w: shape \(3, 2\) has 3 along 'layer', the source has \(1, 2\)",
        ),
    ],
)
def test_plans_that_cannot_work_say_why_in_both_directions(
    rules: list[Rule], shapes: dict[str, tuple[int, ...]], problem: str
):
    made = plan(rules, shapes, {"moe": (1, 2)})
    assert len(made.problems) == 1
    tree = unflatten({path: np.zeros(shape, "f4") for path, shape in shapes.items()})
    with pytest.raises(WeightsError, match=problem):
        export(made, tree)
    with pytest.raises(WeightsError, match=problem):
        read(made, {}, tree)


def test_export_refuses_another_tree_than_was_planned_for():
    made = plan([Rule("w", "w", "d -> d")], {"w": (2,)})
    with pytest.raises(WeightsError, match=r"v: .*\nw: planned with shape \(2,\), the tree has \(3,\)"):
        export(made, {"w": np.zeros(3), "v": np.zeros(1)})
    with pytest.raises(WeightsError, match=r"w: planned with shape \(2,\), the tree has None"):
        export(made, {})


@pytest.mark.parametrize(
    ("source", "axes", "message"),
    [
        ("{layer}", "d layer -> layer d", "must begin with the fields of the source: layer"),
        ("w", "d -> d f", "must have the same axes on both sides"),
        ("w", "d f -> d", "must have the same axes on both sides"),
        ("w", "d d -> d d", "must have the same axes on both sides"),
        ("w", "(n h -> n h", "must look like"),
        ("w", "n) h -> n h", "must look like"),
        ("w", "((n h)) -> n h", "must look like"),
        ("w", "n h -> (n h)", "must look like"),
        ("w", "n -> n 1", "must look like"),
        ("w", "n h", "must look like"),
        ("{part}", "part d -> part d", r"parts=\(\) do not go with '{part}'"),
    ],
)
def test_rules_that_cannot_be_meant_are_refused_where_they_are_written(source: str, axes: str, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        Rule(source, "some/path", axes)
    assert "some/path" in str(caught.value) and "\n" not in str(caught.value)


def test_stacks_and_parts_need_their_fields():
    with pytest.raises(ValueError, match="{stack} needs a {layer}"):
        Rule("w", "{stack}/w", "d -> d")
    with pytest.raises(ValueError, match="do not go with"):
        Rule("w", "w", "d -> d", ("gate", "up"))
