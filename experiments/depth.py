"""Depth: how far away every pixel is, by a small residual network and a U-Net-like decoder.

    python -m vl_jax train --config=experiments/depth.py:rgbd_demo --workdir=runs/rgbd_demo

``rgbd_demo`` learns from drawn scenes, whose depth is exact, and from the first four of five frames of an
indoor recording. It is measured on scenes that training never saw and on the fifth frame. That frame shows
the room of the other four from nearly the same place: its figure says that depth files are read as they
should be, not how well depth is told in other rooms.
"""

import dataclasses
from pathlib import Path

from vl_jax import config
from vl_jax.data.config import DataConfig, LoadingConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.placed import PlacedConfig
from vl_jax.data.sources.synthesis.scenes import SyntheticScenesConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.pixel_depths import PixelDepths
from vl_jax.experiment import Experiment
from vl_jax.heads.depth import Depth
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

DATA = Path("../shared/data")
SIZE = 128
FRAMES = PlacedConfig("frames", "samples.json", depth="depth")
SCENES = SyntheticScenesConfig("scenes", num_examples=20_000, image_size=SIZE)


@dataclasses.dataclass(frozen=True)
class PartConfig:
    """Some records of a source, from one on."""

    name: str
    source: PlacedConfig
    first: int
    count: int

    def open(self, root, *, orientation="shown"):
        """The samples."""
        return Part(self.source.open(root, orientation=orientation), self.first, self.count)


class Part:
    """As many samples of a source as are asked for."""

    def __init__(self, source, first, count):
        self.source, self.first, self.files = source, first, source.files
        self.count = min(count, len(source) - first)

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.source[self.first + index]


def rgbd_demo():
    """Drawn scenes, and a few frames of a room."""
    network = ResNetConfig(
        stem_dim=16,
        stage_dims=(32, 64, 96, 128),
        stage_blocks=(1, 1, 1, 1),
        block="basic",
        statistics="moving",
        image_size=SIZE,
    )
    head = Depth(size=SIZE, dim=32)
    rate = OptimizerConfig(method="muon", learning_rate=1e-3, warmup_steps=50, final_fraction=0.02)
    return Experiment(
        name="rgbd_demo",
        model=JointConfig((Tower("image", network),), (head,)),
        data=DataConfig(
            root=str(DATA / "rgbd_demo"),
            sources=(SCENES, PartConfig("frames", FRAMES, 0, 4)),
            evaluation=(
                dataclasses.replace(SCENES, name="new_scenes", num_examples=100, first=1_000_000),
                PartConfig("fifth_frame", FRAMES, 4, 1),
            ),
            max_tokens=8,
            augmentation=AugmentationConfig(crop=0.2, flip_rate=0.5, brightness=0.2, contrast=0.2),
            tiling=TilingConfig(tile_size=SIZE, views="global", fit="stretch"),
            loading=LoadingConfig(num_threads=2),
        ),
        stages=(
            Stage(
                "measure",
                steps=1200,
                batch_size=8,
                sources=("scenes", "frames"),
                weights=(7.0, 1.0),
                objective=Heads((head.name,)),
                optimizer=rate,
            ),
        ),
        loop=LoopConfig(log_every=20, checkpoint_every=300),
        evaluation=EvaluationConfig(task=PixelDepths(), batch_size=8),
    )


def get_config(name: str = "rgbd_demo"):
    """The experiment of that name."""
    return config.view(config.choose(name, rgbd_demo))
