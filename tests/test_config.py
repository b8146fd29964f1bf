"""Configuration: what goes in comes out, and what is wrong is said in one line with its path."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from vl_jax.config import choose, load, override, view
from vl_jax.data.config import ConversationConfig, DataConfig, LoadingConfig, PackingConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.data.sources.scenes import ScenesConfig
from vl_jax.experiment import Experiment
from vl_jax.moe.config import (
    BalanceConfig,
    CapacityConfig,
    ExecutionConfig,
    ExpertGroupsConfig,
    GateConfig,
    SharedExpertsConfig,
)
from vl_jax.moe.routing import MoEConfig
from vl_jax.schema import TYPE_KEY, ConfigError, from_json, rebuild, to_json
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

pytest.importorskip("ml_collections")  # experiment files return its ConfigDict

EXPERIMENT = load(str(tiny.__file__).replace("tiny.py", "tiny_experiment.py"))


def changed(path: str, text: str, config=EXPERIMENT):
    config_view = view(config)
    override(config_view, path, text)
    return rebuild(config_view)


def refusal(path: str, text: str, config=EXPERIMENT) -> str:
    with pytest.raises(ConfigError) as error:
        changed(path, text, config)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a"), ("z", "m", "a")])
def test_stages_stay_in_the_order_in_which_they_were_written(names):
    stages = tuple(dataclasses.replace(EXPERIMENT.stages[0], name=name) for name in names)
    experiment = dataclasses.replace(EXPERIMENT, stages=stages)
    assert [stage.name for stage in rebuild(view(experiment)).stages] == list(names)
    assert [stage.name for stage in from_json(to_json(experiment), Experiment).stages] == list(names)


def test_view_and_json_give_back_an_equal_config():
    assert rebuild(view(EXPERIMENT)) == EXPERIMENT
    assert from_json(to_json(EXPERIMENT), Experiment) == EXPERIMENT


def test_a_part_that_is_absent_is_switched_on_by_a_field_of_it_and_off_by_none():
    plain = changed("model.moe.balance.scope", "batch")  # the other is not for packed rows
    packed = changed("data.packing.max_tokens", "300", plain)
    assert packed.data.packing == PackingConfig(max_tokens=300) and plain.data.packing is None
    assert changed("data.packing", "None", packed) == plain == changed("data.packing", "None", plain)
    assert "did you mean 'max_tokens'" in refusal("data.packing.max_token", "300")
    assert "is a group" in refusal("data.tiling", "None")
    assert "is a value" in refusal("data.conversation.max_turns.first", "1")


MOES = st.fixed_dictionaries(
    {
        "scheme": st.sampled_from(["top_k", "loss_free"]),
        "num_experts": st.integers(4, 300),
        "top_k": st.integers(1, 4),
        "limit": st.builds(CapacityConfig, st.none() | st.floats(0.1, 8.0)),
        "balance": st.builds(BalanceConfig, st.floats(0, 1) | st.integers(0, 3)),
        "gates": st.builds(GateConfig, normalize=st.booleans()),
    }
)
RATES = st.lists(st.tuples(st.text(), st.floats(0, 9)), max_size=2).map(tuple)


def assert_survives(config):
    assert from_json(to_json(config), type(config)) == config
    assert rebuild(view(config)) == config


@given(MOES)
@pytest.mark.slow
def test_any_moe_config_survives_json_and_view(options):
    assert_survives(MoEConfig(**options))


@given(st.text(min_size=1), st.integers(1, 10**9), st.tuples() | st.tuples(st.text()), RATES)
@pytest.mark.slow
def test_any_stage_survives_json_and_view(name, steps, trainable, rates):
    assert_survives(Stage(name, steps=steps, trainable=trainable, optimizer=OptimizerConfig(rates=rates)))


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("seed", "7", 7),
        ("seed", "1e3", 1000),
        ("name", "7", "7"),
        ("name", "None of these", "None of these"),
        ("model.moe.balance.weight", "1", 1.0),
        ("model.moe.balance.weight", "5e-4", 5e-4),
        ("model.moe.gates.normalize", "TRUE", True),
        ("model.moe.gates.normalize", "false", False),
        ("model.moe.limit.factor", "1.25", 1.25),
        ("model.moe.limit.factor", "None", None),
        ("model.moe.scheme", "expert_choice", "expert_choice"),
        ("data.conversation.max_turns", "None", None),
        ("data.tiling.candidates", "((1, 1), (2, 1))", ((1, 1), (2, 1))),
        ("stages.second.steps", "40", 40),
        ("stages.second.trainable", "('adapter/.*',)", ("adapter/.*",)),
        ("stages.second.trainable", "()", ()),
        ("stages.second.optimizer.betas", "(0.8, 0.9)", (0.8, 0.9)),
        ("data.sources.scenes.languages", "('en',)", ("en",)),
    ],
)
def test_an_override_arrives_with_the_type_of_its_field(path, text, value):
    def named(items, name):
        return next(item for item in items if item.name == name)

    node = changed(path, text)
    for name in path.split("."):
        node = named(node, name) if isinstance(node, tuple) else getattr(node, name)
    assert node == value and type(node) is type(value)


def test_an_override_changes_nothing_else():
    assert dataclasses.replace(changed("seed", "7"), seed=0) == EXPERIMENT


def test_a_none_field_takes_a_value_and_back():
    factor = changed("model.moe.limit.factor", "2.0")
    assert changed("model.moe.limit.factor", "None", factor) == EXPERIMENT


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("sede", "1", "config has no field 'sede'; did you mean 'seed'?"),
        ("model.moe.experts", "4", "config.model.moe has no field 'experts'; did you mean"),
        ("model.moe.zzz", "4", "config.model.moe has no field 'zzz'; fields: scheme, num_experts, "),
        ("model.moe._type", "4", "config.model.moe has no field '_type'"),
        ("seed.x", "4", "config.seed is a value, it has no field 'x'"),
        ("model.moe", "4", "config.model.moe is a group, set one of its fields: scheme, num_experts, "),
        ("seed", "1.5", "config.seed=1.5: expected int"),
        ("seed", "True", "config.seed=True: expected int"),
        ("seed", "None", "config.seed=None: expected int"),
        ("model.moe.gates.normalize", "yes", "config.model.moe.gates.normalize=yes: expected bool"),
        ("model.moe.balance.weight", "much", "config.model.moe.balance.weight=much: expected float"),
        ("model.moe.top_k", "9", "config.model.moe: top_k=9 must be from 1 to num_experts=4"),
        (
            "model.moe.scheme",
            "hashed",
            "config.model.moe: scheme='hashed': no built-in scheme, and not path/to/file.py:name; did you",
        ),
        (
            "stages.second.optimizer.betas",
            "(0.8,)",
            "config.stages.second.optimizer.betas=(0.8,): expected 2 values",
        ),
        ("stages.second.trainable", "(3,)", "config.stages.second.trainable[0]=3: expected str"),
    ],
)
def test_a_bad_override_is_named_with_its_path_and_what_is_allowed(path, text, message):
    assert message in refusal(path, text)


@given(st.text(), st.text())
@pytest.mark.slow
def test_no_override_ends_in_anything_but_a_config_or_one_line(path, text):
    try:
        changed(path, text)
    except ConfigError as error:
        assert str(error)


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=4),
    st.sampled_from(["seed", "name", "stages", "model", "data", "mesh"]),
)
@pytest.mark.slow
def test_no_json_ends_in_anything_but_a_config_or_a_config_error(value, field):
    tree = {**json.loads(to_json(EXPERIMENT)), field: value}
    try:
        rebuild(tree, Experiment)
    except ConfigError as error:
        assert "config" in str(error)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("os:system", "config: class os:system is not one of Experiment"),
        ("MoEConfig", "config: class MoEConfig is not one of Experiment"),
        ("vl_jax.moe.routing:MoEConfig", "is not one of Experiment"),
        ("evil.py:Experiment", "is not one of Experiment"),
    ],
)
def test_a_class_that_the_place_does_not_allow_is_refused(name, message):
    tree = {**json.loads(to_json(EXPERIMENT)), "_type": name}
    with pytest.raises(ConfigError) as error:
        rebuild(tree, Experiment)
    assert message in str(error.value)


def test_a_file_of_an_earlier_version_named_the_modules_of_classes():
    text = to_json(EXPERIMENT)
    old = re.sub(r'"_type": "(\w+)"', r'"_type": "vl_jax.where_it_was:\1"', text)
    assert old != text and from_json(old, Experiment) == EXPERIMENT


@dataclass(frozen=True)
class Inner:
    size: int = 1
    other: int = 2


@dataclass(frozen=True)
class Outer:
    MOVED: ClassVar = {"size": "inner.size"}

    inner: Inner = field(default_factory=Inner)


def test_a_field_that_moved_into_a_group_is_known_by_its_earlier_name():
    file = json.dumps({TYPE_KEY: "Outer", "size": 5})
    assert from_json(file, Outer) == Outer(Inner(size=5))
    both = json.dumps({TYPE_KEY: "Outer", "size": 5, "inner": {TYPE_KEY: "Inner", "other": 7}})
    assert from_json(both, Outer) == Outer(Inner(5, 7))
    assert changed("size", "6", Outer()) == Outer(Inner(size=6))
    with pytest.raises(ConfigError, match=r"config.inner=3: expected a mapping"):
        from_json(json.dumps({TYPE_KEY: "Outer", "size": 5, "inner": 3}), Outer)


# What files held when ``MoEConfig`` had no groups; a capacity is one of the two kinds.
FLAT = {
    TYPE_KEY: "MoEConfig",
    "scheme": "loss_free",
    "num_experts": 16,
    "top_k": 2,
    "expert_dim": 32,
    "num_shared": 1,
    "shared_dim": 48,
    "shared_gate": True,
    "score": "sigmoid",
    "num_groups": 4,
    "top_groups": 2,
    "excluded": "zero",
    "normalize_gates": True,
    "gate_scale": 2.5,
    "router_bias": True,
    "expert_bias": True,
    "balance_weight": 0.25,
    "balance_scope": "step",
    "z_weight": 0.5,
    "bias_rate": 0.125,
    "balanced": True,
    "capacity_factor": None,
    "capacity": None,
    "priority": "gate",
    "exchange": "ring",
    "kernel": "blocked",
    "options": [],
}


@pytest.mark.parametrize("limit", [{}, {"capacity_factor": 1.25}, {"capacity": 3}])
def test_experts_of_a_file_without_groups_are_the_same(limit):
    expected = MoEConfig(
        "loss_free",
        16,
        2,
        32,
        shared=SharedExpertsConfig(num=1, dim=48, gate=True),
        gates=GateConfig(score="sigmoid", normalize=True, scale=2.5),
        groups=ExpertGroupsConfig(num=4, top=2, excluded="zero"),
        router_bias=True,
        expert_bias=True,
        balance=BalanceConfig(weight=0.25, scope="step", z_weight=0.5, bias_rate=0.125, forced=True),
        limit=CapacityConfig(limit.get("capacity_factor"), limit.get("capacity"), priority="gate"),
        execution=ExecutionConfig(exchange="ring", kernel="blocked"),
    )
    assert from_json(json.dumps({**FLAT, **limit}), MoEConfig) == expected
    tree = json.loads(to_json(EXPERIMENT))
    tree["model"]["moe"] = {**FLAT, **limit}
    assert rebuild(tree, Experiment).model.moe == expected


@pytest.mark.parametrize(
    ("name", "text", "path"),
    [
        ("capacity_factor", "1.25", "limit.factor"),
        ("capacity", "3", "limit.slots"),
        ("num_shared", "2", "shared.num"),
        ("normalize_gates", "True", "gates.normalize"),
        ("balance_weight", "0.5", "balance.weight"),
        ("kernel", "blocked", "execution.kernel"),
    ],
)
def test_a_field_of_experts_is_found_by_its_path_without_groups(name, text, path):
    before, now = (changed(f"model.moe.{p}", text) for p in (name, path))
    assert before == now != EXPERIMENT


def test_a_data_config_of_before_its_groups_is_the_same_data_config():
    conversation = ConversationConfig("dialogue", 3, "uniform", merge_turns=2, long_text="split")
    loading = LoadingConfig(num_threads=2, num_workers=3, prefetch=4, cache_mb=5)
    data = dataclasses.replace(EXPERIMENT.data, conversation=conversation, loading=loading)
    tree = json.loads(to_json(data))
    for group in (tree.pop("conversation"), tree.pop("loading")):
        tree |= {name: value for name, value in group.items() if name in DataConfig.MOVED}
    assert len(DataConfig.MOVED) == 9 and DataConfig.MOVED.keys() <= tree.keys()
    assert from_json(json.dumps(tree), DataConfig) == data
    for path in ("data.num_workers", "data.loading.num_workers"):
        assert changed(path, "2").data.loading == LoadingConfig(num_workers=2)
    assert "config.data.loading: num_workers=-1: must not be" in refusal("data.num_workers", "-1")


def test_a_class_in_the_wrong_place_is_refused():
    tree = json.loads(to_json(EXPERIMENT))
    tree["data"]["sources"] = {"x": json.loads(to_json(TilingConfig()))}
    with pytest.raises(
        ConfigError, match="config.data.sources.x: class TilingConfig is not one of ScenesConfig, "
    ):
        rebuild(tree, Experiment)


def test_sources_of_different_classes_stand_side_by_side():
    data = dataclasses.replace(EXPERIMENT.data, sources=(ScenesConfig("a"), LlavaConfig("b", file="b.json")))
    assert from_json(to_json(data), DataConfig) == data and rebuild(view(data)) == data


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(:\n", "bad.py:1: SyntaxError: "),
        ("import nothing_at_all\n", "bad.py:1: ModuleNotFoundError: No module named 'nothing_at_all'"),
        ("def get_config():\n    return 1 / 0\n", "bad.py:2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    return 3\n", "bad.py: get_config() gave int, not a config"),
        ("x = 3\n", "bad.py: the file defines no get_config()"),
        (
            "from vl_jax.moe.routing import MoEConfig\n\ndef get_config():\n    return MoEConfig(top_k=99)\n",
            "bad.py:4: ValueError: top_k=99 must be from 1 to num_experts=64",
        ),
    ],
)
def test_a_broken_experiment_file_is_one_line_with_the_place(tmp_path, source, message):
    file = tmp_path / "bad.py"
    file.write_text(source)
    with pytest.raises(ConfigError) as error:
        load(str(file))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_an_argument_after_the_colon_reaches_the_file(tmp_path):
    file = tmp_path / "sized.py"
    file.write_text(
        "from vl_jax.moe.routing import MoEConfig\n\n\n"
        "def get_config(arg='8'):\n    return MoEConfig(num_experts=int(arg))\n"
    )
    assert load(str(file)).num_experts == 8
    assert load(f"{file}:16", (("top_k", "2"),)) == MoEConfig(num_experts=16, top_k=2)


def test_a_file_of_several_experiments_is_asked_by_name():
    def first(images: int = 0, template: str = "yes"):
        return images, template

    def second():
        return "second"

    assert choose("first,images=50,template=no", first, second) == (50, "no")
    assert choose("second", first, second) == "second"
    for choice, message in {
        "third": "the file has no experiment 'third'; it has first, second",
        "first,pictures=5": "experiment 'first' has no option 'pictures=5'; options and defaults: images=0, "
        "template=yes",
        "first,images": "has no option 'images'",
        "first,images=x": "experiment 'first', option 'images=x': expected int",
        "second,images=1": "experiment 'second' has no option 'images=1'; options and defaults: none",
    }.items():
        with pytest.raises(ConfigError, match=re.escape(message)):
            choose(choice, first, second)
