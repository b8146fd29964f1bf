"""A dense model made sparse says what it said: experts are copies of its blocks, or of pieces of them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from vl_jax import cli
from vl_jax import params as params_lib
from vl_jax.moe.checks.decisions import make_inputs
from vl_jax.moe.config import (
    ExpertGroupsConfig,
    GateConfig,
    SharedExpertsConfig,
    SimpleExpertsConfig,
)
from vl_jax.moe.layer import DynamicMoE
from vl_jax.moe.routing import SCHEMES, MoEConfig, init_state, scheme_of
from vl_jax.moe.specialise import upcycling
from vl_jax.moe.specialise.upcycling import UpcyclingConfig
from vl_jax.runtime.lazy_array import LazyArray
from vl_jax.train.specialise import upcycle

H = 32  # hidden units of the dense blocks
NO_SHARED = SharedExpertsConfig(num=0)


def moe(scheme: str = "top_k", **options: Any) -> MoEConfig:
    sizes = {"num_experts": 4, "top_k": 2, "expert_dim": H, "shared": NO_SHARED}
    return MoEConfig(scheme, **{**sizes, **options})


def models(config: MoEConfig, *, bias: bool = False, scans: tuple[bool, bool] = (True, True)):
    """(a dense model of three layers, the same with experts in the last two)."""
    small = tiny.of_text(tiny.config())
    language = dataclasses.replace(small.language, num_layers=3, num_dense_layers=3, mlp_bias=bias)
    dense, sparse = (dataclasses.replace(language, scan_layers=scan) for scan in scans)
    sparse = dataclasses.replace(sparse, num_dense_layers=1)
    return tuple(dataclasses.replace(small, language=part, moe=config) for part in (dense, sparse))


def upcycled(dense: Any, sparse: Any, *, noise: float = 0.0, seed: int = 0) -> tuple[Any, Any]:
    """Parameters of a dense model, and those of the sparse one that begins with it."""
    own = tiny.build(dense)[0]
    have = {
        f"params/{path}": LazyArray.of(np.asarray(leaf)) for path, leaf in params_lib.flatten(own).items()
    }
    layout = tiny.layout_of(sparse)
    need = params_lib.flatten({"params": layout.params})
    found = upcycle.leaves(sparse.stacks, have, need, UpcyclingConfig(noise), seed=seed, where="runs/x")
    assert found.keys() <= need.keys()
    random = np.random.default_rng(7)  # what begins afresh: any numbers but those of biases
    made = {}
    for path, leaf in need.items():
        if path in found:
            assert found[path].shape == leaf.shape, path
            made[path] = jnp.asarray(found[path][(slice(None),) * leaf.ndim])
        else:
            zero = path.rpartition("/")[2] in ("b_in", "b_out", "router_bias")
            made[path] = jnp.asarray((not zero) * random.standard_normal(leaf.shape, np.float32))
    return own, params_lib.unflatten(made)["params"]


def agree(batch: Any, *pairs: tuple[Any, Any]) -> None:
    """Two models say the same of every token that is there."""
    there = np.asarray(batch.segment_ids) > 0
    expected, found = (tiny.logits(model, batch, params=params)[there] for model, params in pairs)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


HOW = {
    "normalised": {"gates": GateConfig(normalize=True, scale=2.5)},
    "unnormalised": {},
    "sigmoid": {"gates": GateConfig(score="sigmoid"), "num_experts": 6, "top_k": 3},
    "granular": {"gates": GateConfig(normalize=True), "num_experts": 8, "top_k": 4, "expert_dim": H // 4},
    "granular, unnormalised": {"num_experts": 6, "top_k": 4, "expert_dim": H // 2},
    "shared": {"shared": SharedExpertsConfig(num=1, gate=True), "gates": GateConfig(normalize=True)},
    "groups": {
        "num_experts": 8,
        "expert_dim": H // 2,
        "groups": ExpertGroupsConfig(num=2, top=1),
        "gates": GateConfig(normalize=True),
    },
    "biased router": {"router_bias": True, "shared": SharedExpertsConfig(num=2, dim=5)},
}


@pytest.mark.parametrize(
    "how", [pytest.param(h, marks=() if h == "granular" else pytest.mark.slow) for h in HOW]
)
def test_the_sparse_model_says_what_the_dense_one_said(how: str):
    dense, sparse = models(moe(**HOW[how]))
    before, after = upcycled(dense, sparse)
    agree(tiny.varied_batch(4), (dense, before), (sparse, after))


@pytest.mark.slow
@pytest.mark.parametrize("scans", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("bias", [False, True])
def test_layers_and_biases_find_their_places(scans: tuple[bool, bool], bias: bool):
    options = {
        "num_experts": 8,
        "top_k": 4,
        "expert_dim": H // 2,
        "gates": GateConfig(normalize=True, scale=3.0),
    }
    dense, sparse = models(moe(expert_bias=True, **options), bias=bias, scans=scans)
    before, after = upcycled(dense, sparse)
    agree(tiny.varied_batch(4), (dense, before), (sparse, after))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("normalize", [False, True])
def test_every_scheme_is_right_or_refused(scheme: str, normalize: bool):
    top_k = 1 if scheme == "switch" else 2
    config = moe(scheme, top_k=top_k, num_experts=8, gates=GateConfig(normalize=normalize))
    try:
        cut = upcycling.copies(config, width=8, mlp_dim=H)
    except ValueError as error:
        assert str(error).startswith(f"scheme='{scheme}'") and "\n" not in str(error)
        assert scheme not in ("top_k", "top_k_softmax", "switch", "loss_free", "modality_bias", "gshard")
        return
    random, width = np.random.default_rng(0), 8
    w_in, w_out = random.standard_normal((width, 2, H)), random.standard_normal((H, width))
    layer, (x, context) = DynamicMoE(config), make_inputs(0, config)
    state = init_state(config)
    params = nn.meta.unbox(jax.jit(layer.init)(jax.random.key(0), x, context, state))["params"]
    experts = {"w_in": np.stack([w_in] * 8), "w_out": np.stack([w_out] * 8) / cut.gate}
    router = params["router"] * (1.0 if cut.router is None else cut.router)
    params |= {"router": router} | jax.tree.map(np.float32, experts)
    keys = {"routing": jax.random.key(1)} if scheme_of(config).rng else None
    gate, up = np.moveaxis(np.einsum("GTD,DIF->GTIF", x, w_in), 2, 0)
    expected = (gate / (1 + np.exp(-gate)) * up) @ w_out
    said = jax.jit(lambda p, x, where, rngs: layer.apply({"params": p}, x, where, state, rngs=rngs)[0])
    for rngs in (None, keys):
        found = said(params, x, context, rngs)
        np.testing.assert_allclose(
            np.asarray(found)[context.valid], expected[context.valid], atol=2e-5 * np.abs(expected).max()
        )


def test_pieces_of_a_copy_are_chosen_together_and_copies_differ():
    config = moe(num_experts=12, top_k=4, expert_dim=H // 2, gates=GateConfig(normalize=True))
    dense, sparse = models(config)
    own, found = upcycled(dense, sparse, noise=0.1)
    router = np.asarray(found["language"]["moe_layers"]["moe"]["router"])
    np.testing.assert_array_equal(router[..., 0::2], router[..., 1::2])
    assert len(np.unique(router[0, 0])) == 6 and 0.1 < router.std() * 4 < 2
    w_in = np.asarray(found["language"]["moe_layers"]["moe"]["w_in"])
    block = np.asarray(own["language"]["dense_layers"]["mlp"]["w_in"])
    for layer in range(2):
        for expert in range(12):
            piece = np.split(block[1 + layer], 2, axis=-1)[expert % 2]
            off = w_in[layer, expert] - piece
            assert 0.07 < off.std() / block[1 + layer].std() < 0.13
    assert len({w_in[0, e].tobytes() for e in range(12)}) == 12
    again = upcycled(dense, sparse, noise=0.1)[1]
    np.testing.assert_array_equal(again["language"]["moe_layers"]["moe"]["w_in"], w_in)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert_dim": 12}, "expert_dim=12 must divide the 32 hidden units"),
        ({"expert_dim": 8, "num_experts": 6}, "num_experts=6 must be a multiple of the 4 pieces"),
        ({"expert_dim": 16, "top_k": 3}, "scheme='top_k': a token's gates sum to .* for each of 2 pieces"),
        ({"scheme": "remoe"}, "scheme='remoe': a token's gates sum to 0 to"),
        ({"scheme": "expert_choice"}, "scheme='expert_choice': a token's gates sum to .* to "),
        ({"scheme": "soft_moe"}, "scheme='soft_moe' mixes tokens"),
        ({"scheme": "smear", "expert_dim": 16}, "scheme='smear' takes a mean of experts"),
        ({"simple": SimpleExpertsConfig(zero=1)}, "simple has 1 experts without matrices"),
    ],
)
def test_what_would_say_something_else_is_refused_in_one_line(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message) as error:
        upcycling.copies(moe(**options), width=16, mlp_dim=H)
    assert "\n" not in str(error.value)


def test_blocks_and_layers_that_do_not_fit_are_named():
    dense, sparse = models(moe(), bias=True)
    with pytest.raises(ValueError, match="language/moe_layers/moe: moe.expert_bias=False: the blocks have"):
        upcycled(dense, sparse)
    with pytest.raises(ValueError, match="config.init_dense: runs/x has experts wherever the model has"):
        upcycled(sparse, sparse)
    dense, sparse = models(moe())
    longer = dataclasses.replace(sparse, language=dataclasses.replace(sparse.language, num_layers=4))
    with pytest.raises(ValueError, match="language has 3 layers in runs/x and 4 in the model"):
        upcycled(dense, longer)


@pytest.mark.slow
def test_the_first_loss_of_an_upcycled_run_is_that_of_the_dense_one(tmp_path: Path, capsys):
    pytest.importorskip("ml_collections")
    pytest.importorskip("grain")
    file = str(tiny.__file__).replace("tiny.py", "tiny_experiment.py")
    short = ("--config.stages.first.steps=2", "--config.stages.second.steps=1")
    flat = ("--config.model.language.num_dense_layers=2", "--config.loop.churn=False")
    dense = tmp_path / "dense"
    assert cli.main(["train", f"--config={file}", f"--workdir={dense}", *short, *flat]) == 0
    more = [
        "--config.model.moe.expert_dim=16",
        "--config.model.moe.top_k=4",
        "--config.model.moe.num_experts=8",
        f"--config.init={dense}",
    ]
    lines = {}
    for name, given in {"on": flat, "sparse": ["--config.init_dense.noise=0"]}.items():
        run = tmp_path / name
        assert cli.main(["train", f"--config={file}", f"--workdir={run}", *short, *more, *given]) == 0
        lines[name] = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first = {name: next(line["loss"] for line in of if "loss" in line) for name, of in lines.items()}
    assert abs(first["sparse"] - first["on"]) <= 1e-5
    assert "loss" in lines["sparse"][0]
    assert (
        cli.main(["train", f"--config={file}", f"--workdir={tmp_path / 'c'}", "--config.init_dense.noise=0"])
        == 2
    )
    assert "init_dense needs init" in capsys.readouterr().err
