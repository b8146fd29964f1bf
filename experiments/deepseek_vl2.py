"""DeepSeek-VL2 from nothing, at its three sizes and in its three stages.

    python -m vl_jax fit --config=experiments/deepseek_vl2.py:tiny --topology=v5e:4x4
    python -m vl_jax train --config=experiments/deepseek_vl2.py:base --config.data.root=... --workdir=...

``tiny`` has 3.4 billion parameters, ``small`` 16.1 and ``base`` 27.5. Sizes and recipe are the paper's (arXiv
2412.10302, tables 1 and 2, section 3); the steps follow from the tokens of each stage and full batches.
``data`` is to be set: captions for alignment, a mixture of pictures with text and of text alone for
pretraining, dialogues for fine-tuning (see ``docs/data.md``). The paper begins with a trained language model;
here ``init`` names one. A batch is cut into micro-batches of 64 rows, so that 64 devices, or as many pairs,
take one each; for other slices set ``accumulation`` and ``mesh`` to what ``fit --search`` finds. Base's 3,328
rows in place of the paper's 3,360 divide by them.
"""

import dataclasses

from vl_jax import config
from vl_jax.data.config import ConversationConfig, DataConfig, PackingConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment
from vl_jax.language.decoder import DecoderConfig
from vl_jax.language.gqa import GQAConfig
from vl_jax.language.mla import MLAConfig
from vl_jax.model import VisionLanguageConfig
from vl_jax.moe.config import BalanceConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.sharding import MeshConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

LENGTH, TILES = 4096, 20  # of a row, which holds several samples
MICRO_BATCH = 64  # rows; the shards of the batch divide it
PUBLISHED = VisionLanguageConfig()  # the base model's sizes
# A packed row is no sequence: experts are balanced over the batch.
BASE = dataclasses.replace(
    PUBLISHED,
    language=DecoderConfig(remat="full"),
    moe=dataclasses.replace(PUBLISHED.moe, balance=BalanceConfig(weight=1e-4, scope="batch")),
    dtype="bfloat16",
)
BALANCE = BalanceConfig(weight=1e-3, scope="batch")
SMALL = dataclasses.replace(
    BASE,
    language=DecoderConfig(
        vocab_size=102_400,
        embed_dim=2048,
        mlp_dim=10_944,
        num_layers=27,
        attention=MLAConfig(num_heads=16),
        remat="full",
    ),
    moe=MoEConfig(num_experts=64, expert_dim=1408, balance=BALANCE),
)
TINY = dataclasses.replace(
    BASE,
    language=DecoderConfig(
        embed_dim=1280,
        mlp_dim=6848,
        num_layers=12,
        attention=GQAConfig(num_heads=10, num_kv_heads=10),
        remat="full",
    ),
    moe=MoEConfig(num_experts=64, expert_dim=896, balance=BALANCE),
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the sizes of the family do not share."""

    rate: float  # of alignment and pretraining, at its peak
    tuning_rate: float
    rows: int  # of pretraining
    tokens: float  # of pretraining


def stages(recipe: Recipe) -> tuple[Stage, ...]:
    """Alignment of the tower, pretraining of everything, fine-tuning on answers."""
    slower = (("encoder/.*", 0.1),)
    begin = OptimizerConfig(learning_rate=recipe.rate, warmup_steps=500, rates=slower)
    steady = dataclasses.replace(begin, learning_rate=recipe.tuning_rate, schedule="constant")
    return (
        Stage(
            "alignment",
            steps=round(2.0e9 / (256 * LENGTH)),
            batch_size=256,
            accumulation=256 // MICRO_BATCH,
            targets="all",
            trainable=("encoder/.*", "adapter/.*"),
            optimizer=begin,
        ),
        Stage(
            "pretraining",
            steps=round(recipe.tokens / (recipe.rows * LENGTH)),
            batch_size=recipe.rows,
            accumulation=recipe.rows // MICRO_BATCH,
            targets="all",
            optimizer=dataclasses.replace(begin, schedule="step"),
        ),
        Stage("sft", steps=round(19.5e9 / (64 * LENGTH)), batch_size=64, optimizer=steady),
    )


SIZES = {
    "tiny": (TINY, Recipe(rate=5.4e-4, tuning_rate=3.0e-5, rows=2304, tokens=798.5e9)),
    "small": (SMALL, Recipe(rate=4.2e-4, tuning_rate=1.4e-5, rows=2304, tokens=808.9e9)),
    "base": (BASE, Recipe(rate=4.5e-4, tuning_rate=2.0e-5, rows=3328, tokens=796.5e9)),
}


def get_config(size: str = "tiny"):
    """The experiment; every field can be set on the command line."""
    if size not in SIZES:
        raise ValueError(f"{size!r} is not one of {', '.join(SIZES)}")
    model, recipe = SIZES[size]
    return config.view(
        Experiment(
            name=f"deepseek_vl2_{size}",
            model=model,
            data=DataConfig(
                root=".",
                sources=(LlavaConfig(name="train", file="train.json"),),
                evaluation=(LlavaConfig(name="val", file="val.json"),),
                max_tokens=LENGTH,
                max_tiles=10,
                conversation=ConversationConfig(turns="dialogue"),
                packing=PackingConfig(max_tokens=LENGTH, max_tiles=TILES),
            ),
            stages=stages(recipe),
            loop=LoopConfig(log_every=10, routing_every=100, checkpoint_every=1000),
            evaluation=EvaluationConfig(batch_size=64, limit=1024, max_new_tokens=64),
            mesh=MeshConfig(data=1, fsdp=-1, tensor=2 if size == "base" else 1),
        )
    )
