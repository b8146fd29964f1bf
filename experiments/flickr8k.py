"""Captions of photographs in English and Chinese: real JPEG files with tiles of 96 pixels and dynamic tiling.

    python -m vl_jax train --config=experiments/flickr8k.py \
        --config.data.root=../shared/data/flickr8k_bilingual --workdir=runs/flickr8k

A format and machinery check at this scale, not a captioner: 623 photographs cannot teach one from scratch.
"""

from vl_jax import config
from vl_jax.data.config import ConversationConfig, DataConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.encoders.adapter import AdapterConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment
from vl_jax.language.decoder import DecoderConfig
from vl_jax.language.mla import MLAConfig
from vl_jax.model import VisionLanguageConfig
from vl_jax.moe.config import GateConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

MODEL = VisionLanguageConfig(
    encoder=ViTConfig(
        image_size=96, patch_size=16, embed_dim=96, mlp_dim=256, num_layers=2, num_heads=4, stem="conv"
    ),
    adapter=AdapterConfig(downsample=2),
    language=DecoderConfig(
        vocab_size=2048,
        embed_dim=96,
        mlp_dim=256,
        num_layers=3,
        attention=MLAConfig(num_heads=4, kv_lora_rank=48, qk_nope_dim=24, qk_rope_dim=16, v_head_dim=24),
    ),
    moe=MoEConfig(
        scheme="loss_free",
        num_experts=8,
        top_k=2,
        expert_dim=96,
        shared=SharedExpertsConfig(num=1),
        gates=GateConfig(normalize=True),
    ),
)
GRIDS = ((1, 1), (1, 2), (2, 1), (2, 2))


def get_config():
    """Two stages: alignment with the language model frozen, then everything."""
    rate = OptimizerConfig(learning_rate=1e-3, warmup_steps=30)
    return config.view(
        Experiment(
            name="flickr8k",
            model=MODEL,
            data=DataConfig(
                root="../shared/data/flickr8k_bilingual",
                sources=(LlavaConfig(name="train", file="train.json"),),
                evaluation=(LlavaConfig(name="val", file="val.json"),),
                max_tokens=160,
                max_tiles=5,
                conversation=ConversationConfig(turns="dialogue"),
                tiling=TilingConfig(tile_size=96, candidates=GRIDS),
            ),
            stages=(
                Stage(
                    "alignment",
                    steps=40,
                    batch_size=8,
                    trainable=("encoder/.*", "adapter/.*"),
                    optimizer=rate,
                ),
                Stage("pretraining", steps=360, batch_size=8, optimizer=rate),
            ),
            loop=LoopConfig(checkpoint_every=200),
            evaluation=EvaluationConfig(limit=128, max_new_tokens=40),
        )
    )
