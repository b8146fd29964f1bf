"""A volume and a record: whether an adrenal gland has a mass, from its shape and what is written about it.

    python -m vl_jax train --config=joint/volume --workdir=runs/volume
    python -m vl_jax sweep --config=joint/volume --sweep=volume --workdir=runs/volumes
    python -m vl_jax train --config=joint/volume:shape --workdir=runs/shape

Shapes are those of ``adrenal3d`` (MedMNIST) at 32 voxels a side, by a residual network of three dimensions.
The set has no records. Here a sentence is written for every patient that fits the finding eight times out of
ten, in one of several wordings; so this shows that both are read, and nothing about patients. ``shape`` is
the network alone, on the official split. Not for clinical use.
"""

from vl_jax import config
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.config import DataConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.build import WrittenConfig
from vl_jax.data.sources.filters.written import Wording
from vl_jax.data.sources.recorded.arrays import RecordedArraysConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.encoders.video.resnet3d import VideoResNetConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.experiment import Experiment
from vl_jax.fusion.build import Apart
from vl_jax.fusion.mixing import Mixing
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

SIDE, TOKENS = 32, 32
AGREEMENT = 0.8  # how often a record fits what is found
AUROC = "test: auroc"
WORDINGS = (
    Wording(
        "0",
        (
            "routine check, no complaints",
            "scan for kidney stones, hormones normal",
            "back pain after a fall, blood pressure normal",
            "follow-up of an old fracture, feels well",
        ),
    ),
    Wording(
        "1",
        (
            "high blood pressure that drugs do not lower",
            "low potassium, tired, high aldosterone",
            "spells of sweating and a racing heart",
            "weight gain, round face, high cortisol",
        ),
    ),
)


def ablation_volume():
    """The shape, the record, and both."""
    head, fusion = "model.heads.label.stream", "model.fusion"
    return Ablation(
        arms=(
            Arm("shape", {head: "shape", fusion: "Apart"}),
            Arm("record", {head: "text", fusion: "Apart"}),
            Arm("both", {head: "fused"}),
        ),
        metric=AUROC,
        better="higher",
        claims=(
            Claim(
                *("both", "shape", AUROC, "higher"), says="a record helps (an article on multimodal systems)"
            ),
            Claim(*("both", "record", AUROC, "higher"), says="and the volume beside it (the same)"),
        ),
        equal=("steps", "samples"),
        columns=("test: balanced_accuracy", "test: false_alarms_95"),
        says="Do a volume and a record together tell more than either?",
    )


def get_config(choice: str = "both"):
    """The experiment of that name."""
    return config.view(config.choose(choice, both, shape))


def both():
    """Shape and record."""
    text = TextEncoderConfig(
        vocab_size=2048,
        max_length=TOKENS,
        embed_dim=48,
        mlp_dim=96,
        num_layers=1,
        num_heads=4,
        activation="gelu_tanh",
        causal=False,
        projection_dim=0,
    )
    return _experiment(
        "volume", (_tower(), Tower("text", text, "tokens")), "fused", Mixing(dim=64, dropout=0.2)
    )


def shape():
    """The shape alone."""
    return _experiment("shape", (_tower(),), "shape", Apart())


def _tower():
    network = VideoResNetConfig(
        image_size=SIDE,
        num_frames=SIDE,
        num_channels=1,
        stem_dim=16,
        stage_dims=(16, 32, 64),
        stage_blocks=(1, 1, 1),
        statistics="moving",
        pixel_mean=0.02,  # little of a volume is gland
        pixel_std=0.1,
    )
    return Tower("shape", network, "shape")


def _experiment(name, towers, stream, fusion):
    rate = OptimizerConfig(method="muon", learning_rate=2e-3, warmup_steps=20, final_fraction=0.03)
    return Experiment(
        name=name,
        model=JointConfig(towers, (Classification(("0", "1"), stream=stream),), fusion),
        data=DataConfig(
            root="../shared/data/adrenal3d",
            sources=(_patients("train"),),
            evaluation=(_patients("test"),),
            max_tokens=TOKENS,
            tiling=TilingConfig(tile_size=8),  # rows have a tile, even if nothing is on it
        ),
        stages=(Stage("learn", steps=300, batch_size=16, objective=Heads(), optimizer=rate),),
        loop=LoopConfig(log_every=20, checkpoint_every=1000),
        evaluation=EvaluationConfig(task=Labels(headline="auroc", positive="1", groups=()), batch_size=32),
    )


def _patients(split):
    shapes = RecordedArraysConfig(
        "shapes",
        "adrenalmnist3d_64.npz",
        inputs=f"{split}_images",
        classes=f"{split}_labels",
        medium="shape",
        pool=64 // SIDE,
    )
    return WrittenConfig(split, shapes, "label", WORDINGS, AGREEMENT)
