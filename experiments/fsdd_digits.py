"""Spoken digits: sound files in LLaVA JSON, heard as log-mel spectrograms by an image encoder.

    python -m vl_jax train --config=experiments/fsdd_digits.py \
        --config.data.root=../shared/data/fsdd_digits --workdir=runs/fsdd_digits

A picture is 64 bands of mel high and 64 columns of 12 ms wide; the few recordings of more than 0.77 s are
squeezed into it.
"""

from vl_jax import config
from vl_jax.data.config import DataConfig
from vl_jax.data.images.audio import AudioConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment
from vl_jax.train.loop import LoopConfig
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

QUICKSTART = config.load("quickstart")
AUDIO = AudioConfig(
    sample_rate=8000, window_ms=32, hop_ms=12, num_bands=64, floor_db=-100, min_seconds=0.768, max_seconds=5
)


def get_config():
    """Crops move a sound in time and pitch, brightness changes how loud it is: 923 recordings are few."""
    return config.view(
        Experiment(
            name="fsdd_digits",
            model=QUICKSTART.model,
            data=DataConfig(
                root="../shared/data/fsdd_digits",
                sources=(LlavaConfig(name="train", file="train.json", audio=AUDIO),),
                evaluation=(LlavaConfig(name="val", file="val.json", audio=AUDIO),),
                max_tokens=48,
                max_answer_tokens=8,
                image_dropout_rate=0.02,
                augmentation=AugmentationConfig(brightness=0.3, contrast=0.2, crop=0.25),
                tiling=TilingConfig(tile_size=64, views="global", padding_colour=(0, 0, 0)),
            ),
            stages=(
                Stage(
                    "sft",
                    steps=700,
                    batch_size=32,
                    optimizer=OptimizerConfig(
                        method="muon", learning_rate=1e-3, warmup_steps=30, final_fraction=0.03
                    ),
                ),
            ),
            loop=LoopConfig(log_every=10, routing_every=50, checkpoint_every=400),
            evaluation=EvaluationConfig(batch_size=109, max_new_tokens=6),
        )
    )
