"""Instances: objects with a box and a mask each, by a small residual network, prototypes and coefficients.

    python -m vl_jax train --config=experiments/instances.py:pennfudan --workdir=runs/pennfudan

Choices: ``pennfudan`` (pedestrians in street photographs, 104 pictures). Training starts from nothing. The
figures that are published for this set start from networks that saw COCO or ImageNet, so they are no
comparison.
"""

from pathlib import Path

from vl_jax import config
from vl_jax.data.config import DataConfig, LoadingConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.placed import PlacedConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.found_masks import FoundMasks
from vl_jax.experiment import Experiment
from vl_jax.heads.detector import DetectorConfig
from vl_jax.heads.instances import InstanceMasks
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

DATA = Path("../shared/data")
SIZE = 192


def pennfudan():
    """Pedestrians, up to eight in a picture, some behind others."""
    train, val = (
        PlacedConfig(name, f"{name}.json", boxes="boxes", objects="mask") for name in ("train", "val")
    )
    network = ResNetConfig(
        stem_dim=16,
        stage_dims=(32, 64, 96, 128),
        stage_blocks=(1, 1, 1, 1),
        block="basic",
        statistics="moving",
        image_size=SIZE,
    )
    # The finest map that boxes are read from has cells of eight pixels; masks have cells of four.
    head = InstanceMasks(
        ("pedestrian",),
        field="mask",
        size=SIZE,
        most_objects=16,
        network=DetectorConfig(levels=(1, 2, 3), width=48, depth=1, coefficients=16),
    )
    look = AugmentationConfig(crop=0.3, flip_rate=0.5, brightness=0.3, contrast=0.3, saturation=0.3)
    rate = OptimizerConfig(method="muon", learning_rate=1e-3, warmup_steps=50, final_fraction=0.02)
    return Experiment(
        name="pennfudan",
        model=JointConfig((Tower("image", network),), (head,)),
        data=DataConfig(
            root=str(DATA / "pennfudan"),
            sources=(train,),
            evaluation=(val,),
            max_tokens=8,
            augmentation=look,
            tiling=TilingConfig(tile_size=SIZE, views="global"),
            loading=LoadingConfig(num_threads=2),
        ),
        stages=(Stage("segment", steps=1000, batch_size=8, objective=Heads((head.name,)), optimizer=rate),),
        loop=LoopConfig(log_every=20, checkpoint_every=250),
        evaluation=EvaluationConfig(task=FoundMasks(), batch_size=8),
    )


def get_config(name: str = "pennfudan"):
    """The experiment of that name."""
    return config.view(config.choose(name, pennfudan))
