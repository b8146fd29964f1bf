"""Every parameter of the package says what it is: a hidden matrix of these sides, and whether it decays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
import tiny

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.encoders.high_resolution import HighResolution, HighResolutionConfig, ResolutionAligner
from vl_jax.encoders.resnet import ResNet, ResNetConfig
from vl_jax.encoders.sam import SAMConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.encoders.vit import ViT, ViTConfig
from vl_jax.heads.pairs import Pairs
from vl_jax.joint import JointConfig, Tower
from vl_jax.language.encoder_decoder import EncoderDecoder, EncoderDecoderConfig, StackConfig
from vl_jax.language.gqa import GQAConfig
from vl_jax.model import VisionLanguage, VisionLanguageConfig
from vl_jax.moe.config import CapacityConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.stacks import init_state
from vl_jax.nn.layers import GatedMLP, fan_in, named
from vl_jax.roles import ORDINARY, Role

VIT = ViTConfig(
    image_size=8,
    patch_size=4,
    embed_dim=16,
    mlp_dim=24,
    num_layers=2,
    num_heads=2,
    class_token=True,
    pre_norm=True,
    pooling="class",
    projection_dim=6,
    projection_bias=True,
)
TEXT = TextEncoderConfig(
    vocab_size=32, max_length=8, embed_dim=16, mlp_dim=24, num_layers=2, num_heads=2, projection_dim=6
)
SAM = SAMConfig(
    image_size=32,
    patch_size=4,
    embed_dim=12,
    mlp_dim=16,
    output_dim=6,
    num_layers=3,
    num_heads=2,
    window=3,
    global_layers=(1,),
)
MODEL = tiny.config()
BIASED = {"router_bias": True, "expert_bias": True, "shared": SharedExpertsConfig(num=1, gate=True)}


def language(attention: Any, **options: Any) -> VisionLanguageConfig:
    decoder = dataclasses.replace(MODEL.language, attention=attention, tie_embeddings=False)
    return dataclasses.replace(tiny.config(**options), language=decoder)


def decoder(config: VisionLanguageConfig) -> Callable[[jax.Array], Any]:
    batch = jax.tree.map(jnp.asarray, config.smallest_batch(1))
    routing = init_state(config.stacks)
    return lambda key: VisionLanguage(config).init(key, batch, routing, method="initialize")


def encoder_decoder(key: jax.Array) -> Any:
    stacks = {"encoder": StackConfig(3, (1, 2)), "decoder": StackConfig(2, (1,))}
    sizes = {"vocab_size": 32, "embed_dim": 16, "mlp_dim": 12, "num_heads": 2, "head_dim": 6}
    config = EncoderDecoderConfig(**stacks, **sizes, tie_embeddings=False)
    moe = MoEConfig(
        num_experts=3,
        top_k=1,
        expert_dim=12,
        shared=SharedExpertsConfig(num=0),
        limit=CapacityConfig(slots=2),
    )
    return EncoderDecoder(config, moe).init(key, jnp.ones((1, 4), int), jnp.ones((1, 3), int))


PIXELS = jnp.zeros((1, 8, 8, 3))
CONV = dataclasses.replace(VIT, stem="conv", pooling="attention")
SIGMOID = JointConfig((Tower("image", VIT), Tower("text", TEXT, "tokens")), (Pairs(dim=None, bias=True),))
MLA = dataclasses.replace(MODEL.language.attention, q_lora_rank=6, use_bias=True)
GQA = GQAConfig(
    num_heads=4, num_kv_heads=2, head_dim=4, qkv_bias=True, output_bias=True, qk_norm=True, sinks=True
)
MODULES: dict[str, Callable[[jax.Array], Any]] = {
    "vit": lambda key: ViT(CONV).init(key, PIXELS, method="encode"),
    "contrastive": lambda key: SIGMOID.build().init(key, SIGMOID.smallest_batch(1), {}),
    "resnet": lambda key: ResNet(ResNetConfig(stem_dim=4, stage_dims=(8, 12), stage_blocks=(3, 1))).init(
        key, jnp.zeros((1, 32, 32, 3))
    ),
    "sam": lambda key: HighResolution(HighResolutionConfig(SAM, grid=2)).init(key, jnp.zeros((1, 32, 32, 3))),
    "aligner": lambda key: ResolutionAligner(8).init(key, jnp.zeros((1, 4, 6)), jnp.zeros((1, 4, 6))),
    "mla": decoder(language(MLA, **BIASED)),
    "gqa": decoder(language(GQA)),
    "gated": decoder(tiny.config(fusion="gated")),
    "encoder_decoder": encoder_decoder,
    "biased": lambda key: GatedMLP(8, use_bias=True).init(key, jnp.zeros((1, 4))),
}

# By the last name of a path: axes of the stack of one layer, inputs and outputs, in this order of letters.
MATRICES = {
    "kernel": ("DF", "D", "F"),
    "qkv": ("DXNH", "D", "XNH"),
    "project": ("NHD", "NH", "D"),
    "query": ("DNH", "D", "NH"),
    "key": ("DNH", "D", "NH"),
    "value": ("DNH", "D", "NH"),
    "kv_up": ("NHR", "R", "NH"),
    "output": ("NHD", "NH", "D"),
    "w_in": ("DXF", "D", "F"),
    "w_out": ("FD", "F", "D"),
}
CONVOLUTIONS = ("stem", "conv", "conv1", "conv2")
DECAY_ALONE = {"router", "selector", "head/kernel"}
NEITHER = {
    *("scale", "bias", "bias_0", "bias_1", "bias_2", "bias_3", "bias_4"),  # norms and biases
    *("qkv_bias", "project_bias", "query_bias", "key_bias", "value_bias", "output_bias"),
    *("b_in", "b_out", "router_bias"),
    *("positions", "position_bias", "rows", "columns"),  # absolute and relative positions
    *("embedding", "source_embedding", "target_embedding"),
    *("class_token", "newline", "separator", "probe"),  # learned tokens
    *("opening", "share", "sinks"),
}


def placements(module: str) -> dict[str, sharding.Placement]:
    boxed = jax.eval_shape(MODULES[module], jax.random.key(0))["params"]
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    return sharding.place(boxed, mesh, sharding.AxisRules())


def expected(path: str) -> Role:
    name = path.rpartition("/")[2]
    if name in NEITHER:
        return Role()
    if path.endswith(tuple(DECAY_ALONE)):
        return ORDINARY
    parent = path.split("/")[-2] if "/" in path else ""
    if name.startswith("kernel_") or (name == "kernel" and parent in CONVOLUTIONS):
        return Role((-4, -3, -2), (-1,), decay=True)
    letters, inputs, outputs = MATRICES[name]
    axes = {letter: i - len(letters) for i, letter in enumerate(letters)}
    experts = -len(letters) - 1 if parent == "moe" else None
    return Role(tuple(axes[a] for a in inputs), tuple(axes[a] for a in outputs), True, experts)


@pytest.mark.parametrize("module", MODULES)
def test_every_parameter_has_the_role_that_its_kind_has(module: str):
    found = {path: placement.role for path, placement in placements(module).items()}
    assert found == {path: expected(path) for path in found}


@pytest.mark.parametrize("module", MODULES)
def test_what_is_no_side_of_a_matrix_stacks_layers_experts_or_the_inputs_of_an_activation(module: str):
    for path, placement in placements(module).items():
        role, ndim = placement.role, len(placement.names)
        if not role.is_matrix:
            continue
        sides = {a + ndim for a in role.inputs + role.outputs}
        assert sides <= set(range(ndim)) and len(sides) == len(role.inputs) + len(role.outputs), path
        stack = [a for a in range(ndim) if a not in sides]
        stacked = [placement.names[a] for a in stack if placement.names[a] in ("layers", "experts")]
        assert len(stack) - len(stacked) == (path.rpartition("/")[2] == "w_in"), path


def test_all_modules_together_have_every_kind_of_parameter():
    names = {path for module in MODULES for path in placements(module)}
    last = {path.rpartition("/")[2] for path in names}
    assert last >= NEITHER | MATRICES.keys() | {"router", "selector"}
    assert any(path.endswith("head/kernel") for path in names)


def test_the_convolution_at_the_stem_is_one_matrix():
    placement = placements("resnet")["stem/conv/kernel"]
    boxed = jax.eval_shape(MODULES["resnet"], jax.random.key(0))["params"]
    shape = nn.meta.unbox(boxed)["stem"]["conv"]["kernel"].shape
    assert math.prod(shape[a] for a in placement.role.inputs) == 7 * 7 * 3
    assert math.prod(shape) == 7 * 7 * 3 * math.prod(shape[a] for a in placement.role.outputs)


def test_stacking_layers_moves_no_side():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            init = named(fan_in(), "embed", "mlp", inputs=(0,))
            return x @ self.param("kernel", init, (4, 4)), None

    stack = nn.scan(
        Layer,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    boxed = stack().init(jax.random.key(0), jnp.ones(4), None)["params"]["kernel"]
    assert boxed.names == ("layers", "embed", "mlp") and boxed.value.shape == (3, 4, 4)
    assert boxed.role == Role((-2,), (-1,), decay=True)
    assert nn.meta.unbox({"kernel": boxed})["kernel"] is boxed.value


def test_outputs_are_all_that_are_no_inputs_and_a_matrix_decays_unless_told_otherwise():
    def role(*names: str | None, **options: Any) -> Role:
        return named(fan_in(), *names, **options)(jax.random.key(0), (2,) * len(names)).role

    assert role(None, None, None, inputs=(1,)) == Role((-2,), (-3, -1), decay=True)
    assert role(None, None, None, inputs=(0,), outputs=(2,)) == Role((-3,), (-1,), decay=True)
    assert role(None, None) == Role()
    assert role(None, None, decay=True) == ORDINARY
    assert role(None, None, inputs=(0,), decay=False) == Role((-2,), (-1,))


@pytest.mark.parametrize(
    "sides",
    [
        {"inputs": (2,)},
        {"inputs": (-1,)},
        {"outputs": (1,)},
        {"inputs": (0, 1)},
        {"inputs": (0,), "outputs": (0,)},
    ],
)
def test_sides_that_a_parameter_does_not_have_are_refused(sides: dict[str, tuple[int, ...]]):
    with pytest.raises(ValueError, match="are no two sides of 2 axes"):
        named(fan_in(), None, None, **sides)


def test_a_parameter_made_without_a_role_is_an_ordinary_weight():
    mesh = sharding.make_mesh(sharding.MeshConfig(), devices=jax.devices()[:1])
    boxed = {"fc": {"kernel": jax.ShapeDtypeStruct((2, 3), jnp.float32)}}
    assert sharding.place(boxed, mesh, sharding.AxisRules())["fc/kernel"].role == ORDINARY


def test_the_roles_of_a_layout_cover_its_parameters():
    layout = tiny.layout_of(MODEL)
    assert layout.roles.keys() == params_lib.flatten(layout.params).keys()
