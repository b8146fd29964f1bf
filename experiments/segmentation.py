"""Segmentation: the class of every pixel, by a small residual network and a U-Net-like decoder.

    python -m vl_jax train --config=experiments/segmentation.py:camvid --workdir=runs/camvid

Choices: ``camvid`` (road scenes, eleven classes; ENet, arXiv 1606.02147, reaches a mean IoU of 58 from
scratch at 480 x 360, on twice as many pictures) and ``magnetic_tile`` (which pixels are defective; few are,
so the IoU of ``defect`` counts). Classes are weighted by median frequency, and pictures stretched to squares.
"""

from pathlib import Path

from vl_jax import config
from vl_jax.data.config import DataConfig, LoadingConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.placed import PlacedConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.pixel_classes import PixelClasses
from vl_jax.experiment import Experiment
from vl_jax.heads.segmentation import Segmentation
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

DATA = Path("../shared/data")
SPLITS = ("train", "val")
CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
# data.tools.class_weights.median_frequency of the training masks.
CAMVID_WEIGHTS = (0.28, 0.2, 4.76, 0.15, 1.0, 0.42, 3.85, 2.03, 0.79, 6.53, 8.13)
TILE_WEIGHTS = (0.54, 6.27)


def encoder(size, dims=(32, 64, 96, 128)):
    """A residual network of basic blocks, small enough for a few cores."""
    return ResNetConfig(
        stem_dim=32,
        stage_dims=dims,
        stage_blocks=(1,) * len(dims),
        block="basic",
        statistics="moving",
        image_size=size,
    )


def experiment(name, head, sources, *, steps, batch_size=8):
    """An experiment of one head of pixels; ``sources`` are those of training and of ``val``."""
    data = DataConfig(
        root=str(DATA / name),
        sources=sources[:1],
        evaluation=sources[1:],
        max_tokens=8,
        augmentation=AugmentationConfig(brightness=0.2, contrast=0.2, crop=0.2),
        tiling=TilingConfig(tile_size=head.size, views="global", fit="stretch"),
        loading=LoadingConfig(num_threads=2),
    )
    rate = OptimizerConfig(method="muon", learning_rate=1e-3, warmup_steps=50, final_fraction=0.02)
    return Experiment(
        name=name,
        model=JointConfig((Tower("image", encoder(head.size)),), (head,)),
        data=data,
        stages=(
            Stage(
                "segment",
                steps=steps,
                batch_size=batch_size,
                objective=Heads((head.name,)),
                optimizer=rate,
            ),
        ),
        loop=LoopConfig(log_every=20, checkpoint_every=500),
        evaluation=EvaluationConfig(task=PixelClasses(head=head.name), batch_size=batch_size),
    )


def camvid():
    """Eleven classes of what a driving car sees."""
    sources = tuple(PlacedConfig(name, f"{name}.json", classes="mask", void=(11,)) for name in SPLITS)
    head = Segmentation(CLASSES, size=160, dim=48, class_weights=CAMVID_WEIGHTS)
    return experiment("camvid", head, sources, steps=3000)


def magnetic_tile():
    """Defects of magnetic tiles, whatever the defect."""
    sources = tuple(PlacedConfig(name, f"{name}.json", classes="mask", background=0) for name in SPLITS)
    head = Segmentation(("free", "defect"), size=128, dim=32, class_weights=TILE_WEIGHTS)
    return experiment("magnetic_tile", head, sources, steps=2000)


def get_config(name: str = "camvid"):
    """The experiment of that name."""
    return config.view(config.choose(name, camvid, magnetic_tile))
