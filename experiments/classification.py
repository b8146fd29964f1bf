"""Classification: pictures, sounds and questions, by a head on a small transformer whose blocks have experts.

    python -m vl_jax train --config=experiments/classification.py:clothing --workdir=runs/clothing

Choices: ``clothing``, ``magnetic_tile``, ``bccd_cells`` (pictures), ``fsdd_digits`` (spoken digits, as
log-mel pictures) and ``banking77`` (questions to a bank). ``--config.model.towers.image.encoder.moe=None
--config.model.towers.image.encoder.sparse_layers=()`` gives the same encoder without experts.
"""

import csv
import dataclasses
from pathlib import Path

from vl_jax import config
from vl_jax.data.config import DataConfig
from vl_jax.data.images.audio import AudioConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.data.sources.records import RecordsConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.experiment import Experiment
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.moe.config import GateConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

DATA = Path("../shared/data")
EXPERTS = MoEConfig(
    scheme="loss_free", num_experts=8, top_k=2, expert_dim=128, gates=GateConfig(normalize=True)
)
IMAGE = ViTConfig(
    image_size=64,
    patch_size=8,
    stem="conv",
    embed_dim=128,
    mlp_dim=384,
    num_layers=4,
    num_heads=4,
    moe=EXPERTS,
    sparse_layers=(1, 3),
)
TEXT = TextEncoderConfig(
    vocab_size=2048,
    max_length=128,
    embed_dim=128,
    mlp_dim=384,
    num_layers=3,
    num_heads=4,
    activation="gelu_tanh",
    causal=False,
    projection_dim=0,
    moe=EXPERTS,
    sparse_layers=(1,),
)
CLOTHES = ("dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt")
DEFECTS = ("free", "blowhole", "break", "crack", "fray", "uneven")
CELLS = ("red blood cell", "white blood cell", "platelet")
AUDIO = AudioConfig(
    sample_rate=8000, window_ms=32, hop_ms=12, num_bands=64, floor_db=-100, min_seconds=0.768, max_seconds=5
)
PICTURES = AugmentationConfig(brightness=0.2, contrast=0.2, crop=0.3)


def get_config(name: str = "clothing"):
    """The experiment of that name."""
    return config.choose(name, clothing, magnetic_tile, bccd_cells, fsdd_digits, banking77)


def clothing():
    """Ten kinds of clothes, in photographs by volunteers."""
    return _pictures("clothing", _records("train.json"), CLOTHES)


def magnetic_tile():
    """Tiles without a defect and with one of five kinds."""
    return _pictures("magnetic_tile", _records("train.json"), DEFECTS)


def bccd_cells():
    """Which kinds of cell are visible under the microscope; a class is a set of kinds."""
    kinds = [", ".join(k for i, k in enumerate(sorted(CELLS)) if mask >> i & 1) for mask in range(1, 8)]
    source = LlavaConfig("train", "train.json", labels=("answer",))
    return _pictures("bccd_cells", source, tuple(kinds), field="answer")


def fsdd_digits():
    """Spoken digits; a crop moves a sound in time and pitch, brightness changes how loud it is."""
    source = LlavaConfig("train", "train.json", audio=AUDIO, labels=("label",))
    augmentation = AugmentationConfig(brightness=0.3, contrast=0.2, crop=0.25)
    return _pictures("fsdd_digits", source, tuple(map(str, range(10))), augmentation, black=True)


def banking77():
    """77 intents of questions to a bank; the classes are those of the training file."""
    root = DATA / "banking77"
    with open(root / "train.csv", encoding="utf-8", newline="") as file:
        classes = sorted({row["category"] for row in csv.DictReader(file)})
    source = RecordsConfig("train", "train.csv", text="text", labels=("category",))
    head = Classification(tuple(classes), stream="text", field="category")
    model = JointConfig(towers=(Tower("text", TEXT, "tokens"),), heads=(head,))
    data = DataConfig(
        root=str(root),
        sources=(source,),
        evaluation=(dataclasses.replace(source, name="test", file="test.csv"),),
        max_tokens=128,
        tiling=TilingConfig(tile_size=8),  # rows have a tile, even if nothing is on it
    )
    return _experiment("banking77", model, data, steps=1000)


def _records(file: str) -> RecordsConfig:
    return RecordsConfig("train", file, image="image", labels=("label",))


def _pictures(name, source, classes, augmentation=PICTURES, *, field="label", black=False):
    data = DataConfig(
        root=str(DATA / name),
        sources=(source,),
        evaluation=(dataclasses.replace(source, name="val", file="val.json"),),
        max_tokens=8,
        augmentation=augmentation,
        tiling=TilingConfig(
            tile_size=64, views="global", padding_colour=(0, 0, 0) if black else (127, 127, 127)
        ),
    )
    head = Classification(classes, field=field)
    return _experiment(name, JointConfig((Tower("image", IMAGE),), (head,)), data, steps=450)


def _experiment(name, model, data, *, steps):
    rate = OptimizerConfig(method="muon", learning_rate=1e-3, warmup_steps=30, final_fraction=0.03)
    return config.view(
        Experiment(
            name=name,
            model=model,
            data=data,
            stages=(Stage("classify", steps=steps, batch_size=32, objective=Heads(), optimizer=rate),),
            loop=LoopConfig(log_every=10, routing_every=50, checkpoint_every=500),
            evaluation=EvaluationConfig(task=Labels(), batch_size=64),
        )
    )
