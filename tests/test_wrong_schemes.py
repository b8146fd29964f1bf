"""Schemes that are wrong on purpose are refused by the name of the property that they break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import pytest

from vl_jax import cli
from vl_jax.moe import comparisons, conformance
from vl_jax.moe.checks.advice import ADVICE
from vl_jax.moe.checks.subject import NO_SHARED
from vl_jax.moe.config import ExpertGroupsConfig
from vl_jax.moe.routing import MoEConfig

FOLDER = Path(__file__).resolve().parent.parent.parent / "shared" / "faults" / "routers"
needs_folder = pytest.mark.skipif(not FOLDER.is_dir(), reason="no folder of wrong schemes")
SHAPES, TRACES = "shapes and dtypes are right", "two fresh traces agree"
# Scheme in the folder's file: the property that it breaks.
WRONG = {
    "ids_high": "ids in range",
    "ids_negative": "ids in range",
    "wrong_shape": SHAPES,
    "wrong_dtype": SHAPES,
    "one_k_less": SHAPES,
    "vector_loss": SHAPES,
    "bare": SHAPES,
    "leaks": "causal as declared",
    "nan_gates": "weights and losses are finite",
    "nan_rare": "weights and losses are finite",
    "zero_gates": "choices count",
    "stopped": "the router learns",
    "dead_router_k1": "the router learns",
    "zero_loss_scale": "weights are not negative",
    "mutates_s": "route leaves its state alone",
    "python_global": TRACES,
    "np_random": TRACES,
    "np_random_token": TRACES,
    "np_update_s": TRACES,
    "host_callback": "one input, one decision",
    "duplicate": "ids distinct per token",
    "batch_leak": "rows are routed on their own",
    "padding_loss": "padding changes nothing",
    "loss_nan_empty": "nothing but padding is zero",
    "rng_always": "noise as declared",
    "rng_declared_always": "noise as declared",
    "rng_undeclared": "noise as declared",
    "ignores_routes_s": "given routes are taken",
    "ignores_mask": "padding chooses nothing",
    "collapsed": "every expert is reached",
    "big_bias_s": "every expert is reached",
    "bf16": "scores are float32",
    "misspelt_s": "it runs",
    "grow_s": "state keeps its shapes",
    "drop_key_s": "state keeps its shapes",
    "nan_update_s": "the state stays finite",
    "measured_mean_s": "statistics of parts add up",
}
QUICK = ("wrong_shape", "rng_always", "misspelt_s")
OLD_NAMES = {"config.num_groups": "config.groups.num", "config.bias_rate": "config.balance.bias_rate"}


def refused(scheme: str, **options: Any) -> dict[str, str]:
    """What is said of every property that does not hold."""
    if options:
        options = {
            "config": MoEConfig(scheme, num_experts=8, top_k=2, expert_dim=4, shared=NO_SHARED, **options)
        }
    with jax.numpy_dtype_promotion("standard"):  # as users have it; the tests' own is strict
        found = conformance.check(scheme, properties=PROPERTIES, **options)
    return {result.property: str(result) for result in found if result.passed is False}


PROPERTIES = (
    *conformance.PROPERTIES,
    *(p for p in comparisons.COMPARISONS if p[0] == "given routes are taken"),
)


@needs_folder
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in WRONG]
)
def test_a_wrong_scheme_is_refused_by_the_property_that_it_breaks(name):
    said = refused(f"{FOLDER / 'wrong.py'}:{name}")
    cause, remedy = ADVICE[WRONG[name]]
    assert f"; likely: {cause}; remedy: {remedy}" in said[WRONG[name]] and "\n" not in said[WRONG[name]]


@needs_folder
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("temperature", {}),
        ("temperature", {"options": (("floor", 0.5),)}),
        ("threshold", {}),
        ("threshold", {"options": (("k_max", 3), ("rate", 0.2))}),
        ("two_level", {}),
        ("two_level", {"groups": ExpertGroupsConfig(2, 2)}),
        ("two_level", {"groups": ExpertGroupsConfig(4, 4), "options": (("prior", 2),)}),
    ],
)
def test_a_right_scheme_passes_with_groups_and_options_too(tmp_path, name, options):
    source = (FOLDER / f"{name}.py").read_text()
    for old, new in OLD_NAMES.items():
        source = source.replace(old, new)
    file = tmp_path / f"{name}.py"
    file.write_text(source)
    assert not refused(f"{file}:{name}", **options)


BIASED = """
import jax
import jax.numpy as jnp
from vl_jax.moe.routing import Param, Scheme, TokenChoice

def route(logits, context, state, config):
    scores = jax.nn.sigmoid(logits)
    experts = jax.lax.top_k(scores + state["bias"], config.top_k)[1]
    used = context.valid[:, None]
    gates = jnp.take_along_axis(scores, experts, axis=-1)
    return TokenChoice(jnp.where(used, experts, config.num_experts), jnp.where(used, gates, 0.0)), {}

def start(config):
    return {"bias": jnp.zeros(config.num_experts)}

biased = Scheme(route, start)
idle = Scheme(route, start, params=lambda width, config: {"idle": Param((), ())})
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "broken"), [("biased", "excluded experts are passed over"), ("idle", "its parameters learn")]
)
def test_an_exclusion_that_is_ignored_and_a_parameter_that_is_idle_are_found(tmp_path, name, broken):
    file = tmp_path / "biased.py"
    file.write_text(BIASED)
    assert broken in refused(f"{file}:{name}")


def test_every_property_has_a_cause_and_a_remedy():
    for name, _ in (*conformance.PROPERTIES, *comparisons.COMPARISONS):
        assert name in ADVICE or name == "ids in range, weights finite, padding unused"  # which has parts


@pytest.mark.slow
def test_the_layer_of_an_experiment_is_checked_as_it_is(capsys):
    never = ["--config.model.moe.top_k=1", "--config.model.moe.gates.normalize=True"]
    assert cli.main(["conformance", "--config=quickstart", *never]) == 2
    shown = capsys.readouterr()
    assert "language: scheme=loss_free, num_experts=8, top_k=1" in shown.out
    assert "FAILED  the router learns: logits choose the experts" in shown.out
    assert "1 of 25 properties failed" in shown.err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["top_p", "--config.model.moe.options.limit=2.5"],
            "options.limit=2.5 must be a whole number (default: 0)",
        ),
        (["top_p", "--config.model.moe.options.limti=2"], "has no option 'limti'; did you mean 'limit'?"),
        (
            ["top_p", "--config.seed=1"],
            "without --config there is no more than config.model.moe.",
        ),
        ([], "conformance needs a scheme, FILE:NAME, or --config, or both"),
    ],
)
def test_mistakes_are_told_in_one_line(capsys, argv, message):
    assert cli.main(["conformance", *argv]) == 2
    assert message in capsys.readouterr().err
