"""Natural and synthetic pictures in one mixture: how much of it should be drawn.

    python -m vl_jax sweep --config=ablations/mixture --sweep=mixture --workdir=runs/mixture

Defects of circuit boards (``deeppcb``) are to be found. Boards of the data and drawn ones are mixed in every
batch, and all arms take as many steps; what is held out are boards of the data. ``ablations/mixture:4`` is
four times as long.
"""

import dataclasses

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.config import DataConfig, LoadingConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.placed import PlacedConfig
from vl_jax.data.sources.synthesis.boards import DEFECTS, SyntheticBoardsConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.found_boxes import FoundBoxes
from vl_jax.heads.detection import Detection
from vl_jax.heads.detector import DetectorConfig
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.objectives.heads import Heads

SIDE = 224
FOUND = "val: map_50"
_STAGE = "stages.detect"


def _mixed(name: str, real: int, drawn: int) -> Arm:
    return Arm(name, {f"{_STAGE}.sources": "('real', 'drawn')", f"{_STAGE}.weights": f"({real}., {drawn}.)"})


def ablation_mixture():
    """Boards of the data alone, and with drawn ones: three to one, one to one, one to three."""
    return Ablation(
        arms=(
            Arm("real", {f"{_STAGE}.sources": "('real',)", f"{_STAGE}.weights": "()"}),
            _mixed("three_to_one", 3, 1),
            _mixed("one_to_one", 1, 1),
            _mixed("one_to_three", 1, 3),
        ),
        metric=FOUND,
        better="higher",
        claims=(
            Claim(
                *("three_to_one", "real", FOUND, "higher"),
                says="natural to synthetic should be 3 : 1 (an article on DeepSeek-VL, without evidence): "
                "better than without any",
            ),
            Claim(
                *("three_to_one", "one_to_one", FOUND, "higher"),
                says="and better than half and half (the same)",
            ),
            Claim(
                *("three_to_one", "one_to_three", FOUND, "higher"),
                says="and than mostly drawn ones (the same)",
            ),
        ),
        equal=("steps", "samples", "parameters", "flops"),
        columns=("val: map", "val: map_33"),
        says="Should there be three natural pictures for each synthetic one?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    network = ResNetConfig(
        stem_dim=16,
        stage_dims=(32, 48, 64),
        stage_blocks=(1, 1, 1),
        block="basic",
        statistics="moving",
        image_size=SIDE,
    )
    head = Detection(DEFECTS, size=SIDE, network=DetectorConfig(levels=(1, 2), width=48, depth=1))
    real = PlacedConfig("real", "train.json", boxes="boxes", pair="difference")
    # Wires, boxes and defects of a board are about as those of the data when it is shown at 320 pixels.
    drawn = SyntheticBoardsConfig(
        "drawn",
        image_size=320,
        pitch=(10, 30),
        min_defects=3,
        max_defects=12,
        template="difference",
        shift=2,
        questions=False,
    )
    rate = dataclasses.replace(
        miniature.RATE, method="muon", learning_rate=1e-3, warmup_steps=30, final_fraction=0.02
    )
    stage = miniature.stage(
        "detect", scale, steps=300, batch_size=8, objective=Heads(("boxes",)), optimizer=rate
    )
    return config.view(
        miniature.experiment(
            scale,
            model=JointConfig((Tower("image", network),), (head,)),
            data=DataConfig(
                root="../shared/data/deeppcb",
                sources=(real, drawn),
                evaluation=(dataclasses.replace(real, name="val", file="val.json"),),
                max_tokens=8,
                augmentation=AugmentationConfig(crop=0.3, flip_rate=0.5),
                tiling=TilingConfig(tile_size=SIDE, views="global"),
                loading=LoadingConfig(num_threads=1),
            ),
            stages=(stage,),
            evaluation=EvaluationConfig(task=FoundBoxes(), batch_size=8),
        )
    )
