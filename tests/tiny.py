"""A small model and batches for it: the sizes that the tests of the core share, and so their compilations.

A row is written as a list of ``Example``s, as the data pipeline makes them, and laid out by its ``Encoder``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vl_jax import params as params_lib
from vl_jax.batch import Batch
from vl_jax.data.config import ModelSpec
from vl_jax.data.encode import Encoder
from vl_jax.data.example import Example
from vl_jax.data.images import tiling
from vl_jax.data.text.tokenizer import load_tokenizer
from vl_jax.encoders.adapter import AdapterConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.fusion.gate import CrossModalGateConfig
from vl_jax.language.decoder import DecoderConfig
from vl_jax.language.mla import MLAConfig
from vl_jax.layout import Layout, plan_layout
from vl_jax.model import LANGUAGE, FusionConfig, VisionLanguage, VisionLanguageConfig
from vl_jax.moe.config import BalanceConfig, CapacityConfig, GateConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.moe.stacks import init_state
from vl_jax.sharding import MeshConfig, make_mesh
from vl_jax.train import loop
from vl_jax.train.program import programs
from vl_jax.train.stages import Stage
from vl_jax.train.step import TrainState

VOCAB, TILES, TILE_SIZE, TILE_TOKENS_SIDE = 48, 2, 8, 2
VISUAL = TILE_TOKENS_SIDE * (TILE_TOKENS_SIDE + 1)  # visual tokens of one tile, with their newlines
FUSIONS = ("prefix", "gated")
SEQUENCE_FIELDS = ("tokens", "positions", "segment_ids", "branch_ids", "visual_slot")
# Name -> options of ``MoEConfig``. All are causal but ``expert_choice``.
SCHEMES: dict[str, dict[str, Any]] = {
    "top_k": {"scheme": "top_k", "balance": BalanceConfig(weight=0.01, z_weight=0.001)},
    "top_k_softmax": {"scheme": "top_k_softmax", "balance": BalanceConfig(weight=0.01)},
    "loss_free": {
        "scheme": "loss_free",
        "gates": GateConfig(normalize=True, scale=2.0),
        "balance": BalanceConfig(weight=0.01),
    },
    "capacity": {"scheme": "top_k", "limit": CapacityConfig(factor=0.5)},
    "expert_choice": {"scheme": "expert_choice", "balance": BalanceConfig(z_weight=0.001)},
}
DROPLESS = ("top_k", "loss_free")


def config(
    scheme: str = "loss_free", *, fusion: str = "prefix", remat: str = "none", **moe: Any
) -> VisionLanguageConfig:
    """A model of one dense and two sparse layers, D=16, E=4, K=2."""
    sizes = {"num_experts": 4, "top_k": 2, "expert_dim": 8, "shared": SharedExpertsConfig(num=1)}
    return VisionLanguageConfig(
        encoder=ViTConfig(
            image_size=TILE_SIZE, patch_size=2, embed_dim=16, mlp_dim=32, num_layers=2, num_heads=2
        ),
        adapter=AdapterConfig(downsample=2, num_layers=2),
        fusion=FusionConfig(kind=fusion, gate=CrossModalGateConfig(num_heads=2, head_dim=8)),  # type: ignore[arg-type]
        language=DecoderConfig(
            vocab_size=VOCAB,
            embed_dim=16,
            mlp_dim=32,
            num_layers=3,
            num_dense_layers=1,
            attention=MLAConfig(num_heads=2, kv_lora_rank=8, qk_nope_dim=4, qk_rope_dim=4, v_head_dim=4),
            remat=remat,  # type: ignore[arg-type]
        ),
        moe=MoEConfig(**{**sizes, **SCHEMES[scheme], **moe}),
    )


def of_text(model: VisionLanguageConfig) -> VisionLanguageConfig:
    """Its two sparse layers alone, without a tower or a dense layer: where these have no part in a test."""
    language = dataclasses.replace(model.language, num_layers=2, num_dense_layers=0)
    return dataclasses.replace(model, encoder=None, language=language)


@functools.cache
def encoder(fusion: str) -> Encoder:
    """Lays out rows of up to 24 tokens and two tiles."""
    return Encoder(
        tokenizer=load_tokenizer(),
        tiling=tiling.TilingConfig(tile_size=TILE_SIZE, views="global"),
        spec=ModelSpec(tile_tokens_side=TILE_TOKENS_SIDE, fusion=fusion, vocab_size=2048),  # type: ignore[arg-type]
        max_tokens=24,
        max_tiles=TILES,
        max_targets=24,
    )


def example(
    seed: int, *, fusion: str = "prefix", text: int = 6, tiles: int = 1, branches: Sequence[int] = ()
) -> Example:
    """A random sample: its tiles, then ``text`` tokens, then independent branches of the given lengths."""
    random = np.random.default_rng(seed)
    layout = [
        tiling.layout(
            (1, 1), tile_tokens_side=TILE_TOKENS_SIDE, views="global", first_tile=t, num_tiles=TILES
        )
        for t in range(tiles)
    ]
    visual = np.concatenate([np.zeros(0, np.int32), *layout])
    seen = len(visual) if fusion == "prefix" else min(tiles, 1)
    trunk = seen + text
    positions = np.concatenate([np.arange(trunk), *(trunk + np.arange(n) for n in branches)]).astype(np.int32)
    total = len(positions)
    slots = np.full(total, -1, np.int32)
    slots[: seen if fusion == "prefix" else 0] = np.arange(seen if fusion == "prefix" else 0)
    tokens = random.integers(4, VOCAB, total).astype(np.int32)
    tokens[:seen] = 3
    weights = np.ones(total, np.float32)
    weights[:seen] = 0
    start = np.arange(len(visual)) if fusion == "prefix" else np.zeros(len(visual))
    return Example(
        id=f"tiny/{seed}",
        tokens=tokens,
        targets=random.integers(4, VOCAB, total).astype(np.int32),
        loss_weights=weights,
        positions=positions,
        branch_ids=np.repeat(np.arange(len(branches) + 1), [trunk, *branches]).astype(np.int32),
        visual_slot=slots,
        tiles=random.integers(0, 256, (tiles, TILE_SIZE, TILE_SIZE, 3)).astype(np.uint8),
        visual_index=visual.astype(np.int32),
        visual_start=start.astype(np.int32),
    )


def batch(
    rows: Sequence[Sequence[Example]],
    *,
    fusion: str = "prefix",
    length: int = 24,
    left: bool = False,
    size: int = 4,
) -> Batch:
    """Rows of examples as a batch of at least ``size`` rows (the last ones empty), so that shapes are few."""
    rows = [*rows, *[[] for _ in range(size - len(rows))]]
    return encoder(fusion).collate(rows, length=length, pad_left=left)


def varied_batch(rows: int, *, fusion: str = "prefix", seed: int = 0) -> Batch:
    """Rows of different lengths and weights: packed, with and without pictures, some of them short."""
    layouts = []
    for i in range(rows):
        first = example(100 * seed + i, fusion=fusion, text=3 + i % 5, tiles=i % 2)
        second = example(100 * seed + 50 + i, fusion=fusion, text=4, tiles=1 - i % 2)
        layouts.append([first, second] if i % 3 else [first])
    return batch(layouts, fusion=fusion)


def layout_of(model: VisionLanguageConfig, mesh: MeshConfig | None = None, *, devices: int = 1) -> Layout:
    """Where the parameters live; one device unless told otherwise."""
    chosen = make_mesh(mesh or MeshConfig(), devices=jax.devices()[:devices])
    return plan_layout(model, varied_batch(8, fusion=model.fusion.kind), chosen)


@functools.cache
def build(model: VisionLanguageConfig) -> tuple[Any, Any]:
    """Random parameters and routing state on one device; nothing is still at its initial zero or one."""
    random = np.random.default_rng(0)

    def draw(path: str, leaf: Any) -> jax.Array:
        value = 0.3 * random.standard_normal(leaf.shape, np.float32) + np.float32(path.endswith("scale"))
        return jnp.asarray(value)

    params = params_lib.map_paths(draw, layout_of(model).params)
    return params, {name: params_lib.map_paths(draw, of) for name, of in init_state(model.stacks).items()}


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: VisionLanguageConfig, params: Any, state: Any, batch: Batch) -> tuple[jax.Array, Any]:
    network = VisionLanguage(model)
    output = network.apply({"params": params}, batch, state)
    return network.apply({"params": params}, output.hidden, method="logits"), output.routed.get(LANGUAGE)  # type: ignore[union-attr]


def forward(model: VisionLanguageConfig, batch: Batch, *, params: Any = None) -> tuple[np.ndarray, Any]:
    """Logits [B T V] and what the decoder's sparse layers returned, compiled once for a model and a shape.

    Given parameters come with the initial routing state.
    """
    own, state = build(model) if params is None else (params, init_state(model.stacks))
    logits, routed = _forward(model, own, state, jax.tree.map(jnp.asarray, batch))
    return np.asarray(logits), routed


def logits(model: VisionLanguageConfig, batch: Batch, *, params: Any = None) -> np.ndarray:
    """Logits [B T V]."""
    return forward(model, batch, params=params)[0]


def train(
    layout: Layout,
    stages: tuple[Stage, ...],
    open_stream: Any,
    *,
    seed: int,
    stop: Any = lambda: None,
    **options: Any,
) -> TrainState:
    """Runs the stages by themselves; options are those of ``loop.course``."""
    made = programs(layout, stages, seed=seed)
    return loop.drive(loop.course(layout, made, open_stream, seed=seed, stop=lambda: None, **options))
