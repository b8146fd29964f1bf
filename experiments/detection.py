"""Detection: objects and their boxes, by a small residual network and a head without anchors.

    python -m vl_jax train --config=experiments/detection.py:deeppcb --workdir=runs/deeppcb
    python -m vl_jax train --config=experiments/detection.py:deeppcb,images=50 --workdir=runs/deeppcb_50
    python -m vl_jax train --config=experiments/detection.py:boards --workdir=runs/boards
    python -m vl_jax train --config=detection:deeppcb --workdir=runs/begun --config.init=runs/boards

Choices: ``deeppcb`` (six kinds of defect of circuit boards; the picture is the board, its template and how
far they differ; ``images=N`` trains on N boards, spread over all, ``template=no`` on the board alone),
``boards`` (drawn boards with the same defects, for ``deeppcb`` to begin with), ``bccd_cells`` (three kinds of
cell under the microscope), ``raccoon`` and ``coco256`` (80 kinds of thing in photographs). DeepPCB's authors
report a mean average precision of 98.6 at an overlap of 0.33, trained on 1,000 boards at 640 pixels.
"""

import dataclasses
from pathlib import Path

from vl_jax import config
from vl_jax.data.config import DataConfig, LoadingConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.placed import PlacedConfig
from vl_jax.data.sources.synthesis.boards import SyntheticBoardsConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.found_boxes import FoundBoxes
from vl_jax.experiment import Experiment
from vl_jax.heads.detection import Detection
from vl_jax.heads.detector import DetectorConfig
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

DATA = Path("../shared/data")
DEFECTS = ("mouse bite", "open circuit", "pin hole", "spur", "spurious copper", "short circuit")
CELLS = ("red blood cell", "white blood cell", "platelet")
THINGS = tuple(
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,"
    "tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,"
    "tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,"
    "hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,mouse,remote,"
    "keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,"
    "hair drier,toothbrush".split(",")
)
SOURCE = PlacedConfig("train", "train.json", boxes="boxes")


@dataclasses.dataclass(frozen=True)
class ThinnedConfig:
    """So many records of a source, evenly spread, for curves of learning."""

    name: str
    source: PlacedConfig
    count: int

    def open(self, root, *, orientation="shown"):
        """The samples."""
        return Thinned(self.source.open(root, orientation=orientation), self.count)


class Thinned:
    """As many samples of a source as are asked for, evenly spread."""

    def __init__(self, source, count):
        self.source, self.count, self.files = source, min(count, len(source)), source.files

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.source[index * len(self.source) // self.count]


def get_config(choice: str = "deeppcb"):
    """The experiment of that name, with its options behind commas."""
    return config.view(config.choose(choice, deeppcb, boards, bccd_cells, raccoon, coco256))


def deeppcb(images: int = 0, template: str = "yes"):
    """Defects of circuit boards, some 20 pixels wide, beside what the difference from the template shows."""
    if template not in ("yes", "no"):
        raise ValueError(f"template={template}: expected yes or no")
    if template == "yes":
        # Brightness and contrast would change both pictures alike; these boards are black and white.
        look, task = {}, FoundBoxes(difference=128)
        source = dataclasses.replace(SOURCE, pair="difference")
    else:
        look, task = {"brightness": 0.2, "contrast": 0.2}, FoundBoxes()
        source = dataclasses.replace(SOURCE, pair="last")
    augmentation = AugmentationConfig(crop=0.3, flip_rate=0.5, **look)
    return _experiment("deeppcb", DEFECTS, source, augmentation, task, images=images, steps=2500)


def boards(template: str = "yes"):
    """Drawn boards with the defects of ``deeppcb``; what is learned of them is measured on its boards."""
    real = deeppcb(template=template)
    # Wires, boxes and defects of a board are about as those of DeepPCB at this size.
    drawn = SyntheticBoardsConfig(
        "train",
        image_size=320,
        pitch=(10, 30),
        min_defects=3,
        max_defects=12,
        template="difference" if template == "yes" else "none",
        shift=2,
        questions=False,
    )
    return dataclasses.replace(real, name="boards", data=dataclasses.replace(real.data, sources=(drawn,)))


def bccd_cells():
    """Kinds of cell under the microscope."""
    look = AugmentationConfig(crop=0.3, flip_rate=0.5, brightness=0.2, contrast=0.2, saturation=0.2)
    return _experiment("bccd_cells", CELLS, SOURCE, look, FoundBoxes(), steps=2500, levels=(1, 2, 3))


def raccoon():
    """One animal in photographs."""
    look = AugmentationConfig(crop=0.3, flip_rate=0.5, brightness=0.3, contrast=0.3, saturation=0.3)
    return _experiment("raccoon", ("raccoon",), SOURCE, look, FoundBoxes(), steps=1500, levels=(2, 3))


def coco256():
    """Things in photographs, far too few of each to learn them from nothing."""
    look = AugmentationConfig(crop=0.3, flip_rate=0.5, brightness=0.3, contrast=0.3, saturation=0.3)
    return _experiment("coco256", THINGS, SOURCE, look, FoundBoxes(), steps=1500, levels=(1, 2, 3))


def _experiment(name, classes, source, augmentation, task, *, steps, images=0, size=320, levels=(1, 2)):
    train = ThinnedConfig("train", source, images) if images else source
    network = ResNetConfig(
        stem_dim=16,
        stage_dims=(32, 64, 96, 128),
        stage_blocks=(1, 1, 1, 1),
        block="basic",
        statistics="moving",
        image_size=size,
    )
    # The finest map that is read has cells of eight pixels.
    head = Detection(classes, size=size, network=DetectorConfig(levels=levels, width=48, depth=1))
    rate = OptimizerConfig(method="muon", learning_rate=1e-3, warmup_steps=50, final_fraction=0.02)
    return Experiment(
        name=name,
        model=JointConfig((Tower("image", network),), (head,)),
        data=DataConfig(
            root=str(DATA / name),
            sources=(train,),
            evaluation=(dataclasses.replace(source, name="val", file="val.json"),),
            max_tokens=8,
            augmentation=augmentation,
            tiling=TilingConfig(tile_size=size, views="global"),
            loading=LoadingConfig(num_threads=2),
        ),
        stages=(Stage("detect", steps=steps, batch_size=8, objective=Heads(("boxes",)), optimizer=rate),),
        loop=LoopConfig(log_every=20, checkpoint_every=500),
        evaluation=EvaluationConfig(task=task, batch_size=8),
    )
