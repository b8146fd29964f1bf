"""Every built-in scheme, and the worked example, passes its conformance checks; errors name the scheme."""

from __future__ import annotations

import dataclasses
import textwrap
from pathlib import Path

import pytest

from vl_jax.moe import comparisons, conformance
from vl_jax.moe.config import BalanceConfig, CapacityConfig, ExpertGroupsConfig, GateConfig
from vl_jax.moe.routing import SCHEMES, MoEConfig

EXAMPLE = f"{Path(__file__).resolve().parent.parent / 'experiments' / 'my_router.py'}:my_router"
EVERY = (*SCHEMES, EXAMPLE)
NAMES = (*SCHEMES, "my_router")
NOTHING_DROPPED = ("soft_moe", "smear")
# A kernel sees an assignment, not the scheme: choices in equal and in differing number, and those of experts.
ALL_KERNELS = ("top_k", "top_p", "expert_choice", *NOTHING_DROPPED)
# Each is close to another scheme.
TWINS = (
    *("sinkhorn", "modality_top_k", "top_p"),
    *("top_k_softmax", "switch", "modality_bias", "gshard", "v_moe", "noisy_top_k"),
    *("remoe", "null_experts", "modality_expert_choice", "expert_threshold"),
)


def failures(results: list[conformance.Result]) -> list[str]:
    return [str(result) for result in results if result.passed is False]


def every_scheme(*slow: str):
    """All schemes as parameters; some are slow."""
    return pytest.mark.parametrize(
        "scheme",
        [
            pytest.param(scheme, id=name, marks=pytest.mark.slow if name in slow else ())
            for scheme, name in zip(EVERY, NAMES, strict=True)
        ],
    )


@every_scheme(*TWINS)
def test_every_scheme_conforms(scheme):
    results = conformance.check(scheme, properties=conformance.PROPERTIES)
    assert not failures(results)
    assert len(results) == 1 + len(conformance.PROPERTIES)


@every_scheme(*NAMES)
def test_kernels_capacity_and_devices_change_nothing(scheme, monkeypatch):
    if scheme not in ALL_KERNELS:
        monkeypatch.setattr(comparisons, "KERNELS", ("reference", "blocked"))
    found = conformance.check(scheme, properties=comparisons.COMPARISONS)
    results = {r.property: r for r in found}
    assert not failures(found)
    assert results["one device = many"].passed
    chosen = scheme not in ("expert_choice", "modality_expert_choice", *NOTHING_DROPPED)
    assert results["given routes are taken"].passed is (True if chosen else None)
    assert (results["kernels agree with few slots"].passed is None) == (scheme in NOTHING_DROPPED)


OPTIONS = {
    "groups": {"groups": ExpertGroupsConfig(num=4, top=2)},
    "gate priority": {"limit": CapacityConfig(0.75, priority="gate")},
    "rank priority": {"limit": CapacityConfig(0.75, priority="rank")},
    "batch balance": {
        "balance": BalanceConfig(scope="batch", z_weight=0.1),
        "gates": GateConfig(normalize=True),
    },
    "step balance": {"balance": BalanceConfig(scope="step")},
    "entropies": {
        "options": (("text_local_entropy", 0.1), ("vision_global_entropy", 0.1), ("min_experts", 6.0))
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_layer_keep_the_properties(options, monkeypatch):
    monkeypatch.setattr(comparisons, "KERNELS", ("reference", "blocked"))
    config = dataclasses.replace(conformance.small_config("top_k"), **options)
    failed = [r.property for r in conformance.check("top_k", config) if r.passed is False]
    # With priority by gate or rank a later token may take the slot of an earlier one.
    assert failed == (["causal as declared"] if config.limit.priority != "position" else [])


# What a scheme returns, and what is said about it.
BROKEN = {
    "ids": ("TokenChoice(ids + config.num_experts, gates), {}", "expert ids from 8 to 15, must be 0 to 8"),
    "shape": ("TokenChoice(ids.T, gates), {}", "experts is int32[2, 8], expected int32[T=8, K]"),
    "gates": ("TokenChoice(ids, gates[:, :1]), {}", "TokenChoice.gates is float32[8, 1]"),
    "dtype": ("TokenChoice(ids, gates.astype(jnp.bfloat16)), {}", "TokenChoice.gates is bfloat16[8, 2]"),
    "kind": ("ids, {}", "returned (int32[8, 2], dict), expected a pair of one of TokenChoice, "),
    "no losses": ("TokenChoice(ids, gates)", "returned TokenChoice, expected a pair"),
    "loss": ("TokenChoice(ids, gates), {'mine': gates}", "loss 'mine' is float32[8, 2], expected a scalar"),
    "nan": ("TokenChoice(ids, 0 * jnp.log(gates - 9)), {}", "gates is not finite"),
}


def broken(tmp_path: Path, end: str, *, before: str = "") -> str:
    file = tmp_path / "broken.py"
    source = f"""
        import jax
        import jax.numpy as jnp
        from vl_jax.moe.routing import Scheme, TokenChoice

        def mine(logits, context, state, config):
            {before}
            gates, ids = jax.lax.top_k(jax.nn.softmax(logits), config.top_k)
            return {end}
    """
    file.write_text(textwrap.dedent(source))
    return f"{file}:mine"


@pytest.mark.parametrize(("end", "message"), BROKEN.values(), ids=BROKEN)
@pytest.mark.slow
def test_a_scheme_that_returns_nonsense_is_told_what_and_named(tmp_path, end, message):
    scheme = broken(tmp_path, end)
    first = next(r for r in conformance.check(scheme, properties=conformance.PROPERTIES[:1]) if not r.passed)
    assert f"scheme='{scheme}': " in first.detail and message in first.detail and "\n" not in first.detail


MASK = "real = context.valid[:, None]"
KEEP = "TokenChoice(jnp.where(real, ids, config.num_experts), jnp.where(real, gates, 0.0)), {}"


@pytest.mark.parametrize(
    ("before", "failed"),
    [
        ("logits = logits + jnp.sum(logits, axis=0) ** 2", "causal as declared"),
        ("logits = logits + jnp.arange(8.0)[:, None] * jnp.arange(8.0)", "permuted tokens, permuted outputs"),
        pytest.param(
            "logits = logits / jnp.sum(context.valid, dtype=jnp.float32)",
            "nothing but padding is zero",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.slow
def test_a_property_that_does_not_hold_is_found(tmp_path, before, failed):
    assert fails(broken(tmp_path, KEEP, before=f"{MASK}; {before}"), failed)


def fails(scheme: str, name: str) -> str:
    """What is said of the one property; empty if it holds."""
    (wanted,) = [p for p in (*conformance.PROPERTIES, *comparisons.COMPARISONS) if p[0] == name]
    return "; ".join(failures(conformance.check(scheme, properties=[wanted])))


def kept(gates: str = "gates", ids: str = "ids", losses: str = "{}") -> str:
    return f"TokenChoice(jnp.where(real, {ids}, config.num_experts), jnp.where(real, {gates}, 0.0)), {losses}"


# What a scheme does to its logits, what it returns, and the property that it breaks.
WRONG = {
    "twice the same expert": ("", kept(ids="jnp.broadcast_to(ids[:, :1], ids.shape)"), "sound on odd inputs"),
    "gates below zero": ("", kept("-gates"), "sound on odd inputs"),
    "a loss per picture token": (
        "",
        kept(losses="{'v': jnp.sum(logits[:, 0] * context.modality) / jnp.sum(context.modality)}"),
        "sound on odd inputs",
    ),
    "gates of zero": ("", kept("0 * gates"), "choices count"),
    "an idle second choice": ("", kept("gates * jnp.array([1.0, 0.0])"), "choices count"),
    "random numbers of numpy": (
        "import numpy as np; logits = logits + np.random.normal(size=8).astype('f')",
        kept(),
        "the input alone decides",
    ),
    "the length of the padding": ("logits = logits / logits.shape[0]", kept(), "the input alone decides"),
    "the mean of other rows": (
        "logits = logits - jax.lax.pmean(logits.mean(axis=0), 'groups')",
        kept(),
        "rows are routed on their own",
    ),
    "the place of the row": (
        "logits = logits + jax.lax.axis_index('groups') * jnp.arange(8.0)",
        kept(),
        "rows are routed on their own",
    ),
    "no gradient": ("", kept("jax.lax.stop_gradient(gates)"), "the router learns"),
    "gates of each other": ("", kept("gates[:, ::-1]"), "higher logits choose"),
    "the least likely": ("logits = -logits", kept(), "higher logits choose"),
    "16 bits": ("logits = logits.astype(jnp.bfloat16).astype(jnp.float32)", kept(), "scores are float32"),
    "always the same": ("", kept(ids="jnp.arange(2)"), "every expert is reached"),
    "noise that is not declared": (
        "logits = logits if context.rng is None else logits + jax.random.normal(context.rng, logits.shape)",
        kept(),
        "noise as declared",
    ),
    "where it runs": (
        "logits = logits if jax.sharding.get_abstract_mesh().empty else -logits",
        kept(),
        "one device = many",
    ),
    "a reward for crowding": (
        "",
        kept(losses="{'balance': -jnp.sum(jnp.where(real, jax.nn.softmax(logits), 0.0).sum(axis=0) ** 2)}"),
        "losses teach",
    ),
}
QUICK_WRONG = ("twice the same expert", "random numbers of numpy", "no gradient", "gates of each other")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK_WRONG else pytest.mark.slow) for n in WRONG]
)
def test_a_scheme_that_decides_wrongly_is_found(tmp_path, name):
    before, end, failed = WRONG[name]
    assert fails(broken(tmp_path, end, before=f"{MASK}; {before}"), failed)


STATEFUL = """
def start(config):
    return {"bias": jnp.zeros(config.num_experts)}

def more(state, stats, config):
    load = stats.load.sum(axis=0).astype(jnp.float32)
    return {"bias": state["bias"] + SIGN 1e-3 * jnp.sign(load - jnp.mean(load))}

def writes(logits, context, state, config):
    state["bias"] = state["bias"] + 1.0
    return mine(logits, context, state, config)

stateful = Scheme(mine, start, more)
careless = Scheme(writes, start)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sign", ["+", "-"])
def test_updates_that_make_load_uneven_are_found(tmp_path, sign):
    before = f"{MASK}; logits = jnp.log(jax.nn.sigmoid(logits)) + state['bias']"
    scheme = broken(tmp_path, KEEP, before=before)
    file = tmp_path / "broken.py"
    file.write_text(file.read_text() + STATEFUL.replace("SIGN", sign))
    found = fails(scheme.replace(":mine", ":stateful"), "every expert is reached")
    assert ("400 updates" in found) == (sign == "+")
    if sign == "-":
        careless = fails(scheme.replace(":mine", ":careless"), "the input alone decides")
        assert "route writes to its state (bias)" in careless


@pytest.mark.slow
def test_a_scheme_that_falsely_calls_itself_non_causal_is_found(tmp_path):
    scheme = broken(tmp_path, KEEP, before=MASK)
    file = tmp_path / "broken.py"
    file.write_text(file.read_text() + "\nflagged = Scheme(mine, causal=False)\n")
    results = conformance.check(scheme.replace(":mine", ":flagged"), properties=conformance.PROPERTIES)
    failed = [(r.property, r.detail) for r in results if r.passed is False]
    assert failed == [("causal as declared", "declared causal=False, but no later token matters")]


@pytest.mark.slow
def test_a_scheme_that_falsely_says_that_it_takes_routes_is_found(tmp_path):
    scheme = broken(tmp_path, KEEP, before=MASK)
    file = tmp_path / "broken.py"
    file.write_text(file.read_text() + "\nflagged = Scheme(mine, replays=True)\n")
    found = fails(scheme.replace(":mine", ":flagged"), "given routes are taken")
    assert "declared replays=True, but it takes other routes than are given" in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k=9 must be from 1 to num_experts=8 .scheme='top_k'."),
        ({"scheme": "smear", "limit": CapacityConfig(slots=1)}, "limit has no meaning for scheme='smear'"),
    ],
)
def test_impossible_settings_name_the_scheme(options, message):
    with pytest.raises(ValueError, match=message):
        MoEConfig(**{"scheme": "top_k", "num_experts": 8, "top_k": 2, **options})
