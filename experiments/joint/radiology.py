"""Radiology: a question about a picture, and a picture with what a doctor dictates.

    python -m vl_jax train --config=joint/radiology --workdir=runs/radiology
    python -m vl_jax train --config=joint/radiology:dictated --workdir=runs/dictated
    python -m vl_jax sweep --config=joint/radiology:dictated --sweep=dictation --workdir=runs/dictations

``answers``: questions about radiographs and scans (``vqa_rad``) that are answered by yes or no, from picture
and question; a model of the question alone stands beside it, for many answers can be guessed. ``dictated``:
chest radiographs of 28 x 28 pixels (``pneumonia_xray28``) with a line of dictation that is written for them,
which fits eight times out of ten. Not for clinical use.
"""

import dataclasses
import json
from pathlib import Path

from vl_jax import config
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.config import DataConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import DEFAULT_MAX_PIXELS, TEXT, Sample, Turn, image_in
from vl_jax.data.sources.build import WrittenConfig
from vl_jax.data.sources.filters.written import Wording
from vl_jax.data.sources.recorded.arrays import RecordedArraysConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.experiment import Experiment
from vl_jax.fusion.co_attention import CoAttention
from vl_jax.fusion.layers import LayersConfig
from vl_jax.fusion.mixing import Mixing
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

TOKENS = 40
AGREEMENT = 0.8  # how often what is dictated fits the picture
AUROC = "test: auroc"
DICTATED = (
    Wording("0", ("lungs are clear", "no consolidation", "normal heart and lungs", "clear on both sides")),
    Wording("1", ("opacity in the lower lobe", "patchy consolidation", "hazy on the right", "infiltrates")),
)
_HEAD, _FUSION = "model.heads.label.stream", "model.fusion"


@dataclasses.dataclass(frozen=True)
class QuestionsConfig:
    """Questions of ``vqa_rad`` that are answered by yes or no."""

    name: str
    file: str

    def open(self, root, *, orientation="shown"):
        """The samples."""
        return Questions(self, Path(root).resolve(), orientation)


class Questions:
    """A sample of a question: its picture, its text, and the answer as a label."""

    def __init__(self, source, root, orientation):
        self.files, self.orientation = [root / source.file], orientation
        records = json.loads(self.files[0].read_text(encoding="utf-8"))
        turns = ((r, *(turn["value"] for turn in r["conversations"])) for r in records)
        self.records = [(r, q, a.lower()) for r, q, a in turns if a.lower() in ("yes", "no")]

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        record, question, answer = self.records[index]
        where = f"sample {record['id']} ({self.files[0]})"
        picture = image_in(self.files[0].parent, record["image"], where, DEFAULT_MAX_PIXELS, self.orientation)
        turn = Turn("<image>\n", question.removeprefix("<image>\n"), kind=TEXT)
        labels = {"label": answer, "organ": record["organ"]}
        return Sample(record["id"], (turn,), (picture,), labels=labels)


def ablation_dictation():
    """The picture, the words, and both."""
    return Ablation(
        arms=(
            Arm("picture", {_HEAD: "image", _FUSION: "Apart"}),
            Arm("words", {_HEAD: "text", _FUSION: "Apart"}),
            Arm("both", {_HEAD: "fused"}),
        ),
        metric=AUROC,
        better="higher",
        claims=(
            Claim(
                *("both", "picture", AUROC, "higher"), says="dictation helps (an article on joint encoders)"
            ),
            Claim(*("both", "words", AUROC, "higher"), says="and the picture beside it (the same)"),
        ),
        equal=("steps", "samples"),
        columns=("test: balanced_accuracy", "test: false_alarms_95"),
        says="Do a radiograph and dictation together tell more than either?",
    )


def get_config(choice: str = "answers"):
    """The experiment of that name."""
    return config.view(config.choose(choice, answers, dictated))


def answers():
    """Yes or no to a question about a picture, by attention between the two."""
    fusion = CoAttention(layers=LayersConfig(dim=96, mlp_dim=192, num_layers=1))
    sources = (
        QuestionsConfig("train", "vqa_rad/train.json"),
        QuestionsConfig("val", "vqa_rad/val.json"),
    )
    head = Classification(("no", "yes"), stream="fused")
    task = Labels(headline="accuracy", groups=("organ",))
    return _experiment("radiology", head, fusion, sources, task, side=96, steps=400)


def dictated():
    """Pneumonia or not, from a small radiograph and a line."""
    sources = tuple(
        WrittenConfig(
            split,
            RecordedArraysConfig(
                "pictures",
                "pneumonia_xray28/pneumoniamnist_balanced.npz",
                inputs=f"{split}_images",
                classes=f"{split}_labels",
            ),
            "label",
            DICTATED,
            AGREEMENT,
        )
        for split in ("train", "test")
    )
    head = Classification(("0", "1"), stream="fused")
    task = Labels(headline="auroc", positive="1", groups=())
    return _experiment("dictated", head, Mixing(dim=64, dropout=0.2), sources, task, side=32, steps=200)


def _experiment(name, head, fusion, sources, task, *, side, steps):
    image = ResNetConfig(
        stem_dim=16,
        stage_dims=(16, 32, 64),
        stage_blocks=(1, 1, 1),
        block="basic",
        statistics="moving",
        image_size=side,
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.25,) * 3,
    )
    text = TextEncoderConfig(
        vocab_size=2048,
        max_length=TOKENS,
        embed_dim=64,
        mlp_dim=128,
        num_layers=2,
        num_heads=4,
        activation="gelu_tanh",
        causal=False,
        projection_dim=0,
    )
    rate = OptimizerConfig(
        method="muon", learning_rate=1e-3, warmup_steps=20, final_fraction=0.03, weight_decay=0.1
    )
    train, held_out = sources
    return Experiment(
        name=name,
        model=JointConfig((Tower("image", image), Tower("text", text, "tokens")), (head,), fusion),
        data=DataConfig(
            root="../shared/data",
            sources=(train,),
            evaluation=(held_out,),
            max_tokens=TOKENS,
            augmentation=AugmentationConfig(brightness=0.2, contrast=0.2, crop=0.2),
            tiling=TilingConfig(tile_size=side, views="global"),
        ),
        stages=(Stage("learn", steps=steps, batch_size=32, objective=Heads(), optimizer=rate),),
        loop=LoopConfig(log_every=20, checkpoint_every=1000),
        evaluation=EvaluationConfig(task=task, batch_size=64),
    )
