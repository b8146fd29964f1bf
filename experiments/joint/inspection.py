"""Inspection: a tile and the vibration of a machine, and whether the tile has a defect.

    python -m vl_jax train --config=joint/inspection --workdir=runs/inspection
    python -m vl_jax sweep --config=joint/inspection --sweep=inspection --workdir=runs/inspections
    python -m vl_jax train --config=joint/inspection:bearing,held_out=21 --workdir=runs/bearing

Tiles (``magnetic_tile``) and vibrations (``cwru_vibration``) were not recorded together. Here a defect goes
with a faulty bearing, and a good tile with a sound one, nine times out of ten. Both at once must be better
than either, or the model does not use them. ``bearing`` tells three kinds of fault by vibration alone, on
bearings of a diameter of fault that training lacks. Rates are equal, and no window is in both splits.
"""

import dataclasses

from vl_jax import config
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.config import DataConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sources.build import MatchedConfig
from vl_jax.data.sources.filters.matched import SameKind
from vl_jax.data.sources.recorded.windows import OnlyWith, RecordedWindowsConfig
from vl_jax.data.sources.records import RecordsConfig
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.series.tcn import TCNConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.experiment import Experiment
from vl_jax.fusion.mixing import Mixing
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

SIDE, WINDOW = 64, 1024
AGREEMENT = 0.9  # how often tile and bearing are both good or both not
ALARMS, AUROC = "val: false_alarms_95", "val: auroc"
DEFECTS = ("blowhole", "break", "crack", "fray", "uneven")
FAULTS = ("ball", "inner", "outer")
DIAMETERS = ("7", "14", "21")  # of a fault, thousandths of an inch
RATE = OptimizerConfig(method="muon", learning_rate=2e-3, warmup_steps=20, final_fraction=0.03)
VIBRATION = TCNConfig(max_length=WINDOW, patch=8, embed_dim=48, num_levels=5, pooling="mean")


@dataclasses.dataclass(frozen=True)
class JudgedConfig:
    """A source of tiles whose label ``state`` says whether they have any defect."""

    name: str
    tiles: RecordsConfig

    def open(self, root, *, orientation="shown"):
        """The samples."""
        return Judged(self.tiles.open(root, orientation=orientation))


class Judged:
    """The samples of a source of tiles, with one label more."""

    def __init__(self, tiles):
        self.tiles, self.files = tiles, tiles.files

    def __len__(self):
        return len(self.tiles)

    def __getitem__(self, index):
        sample = self.tiles[index]
        state = "defect" if sample.labels["label"] in DEFECTS else "good"
        return dataclasses.replace(sample, labels={**sample.labels, "state": state})


def ablation_inspection():
    """The tile alone, the vibration alone, and two ways to read both."""
    head, fusion = "model.heads.state.stream", "model.fusion"
    return Ablation(
        arms=(
            Arm("tile", {head: "image", fusion: "Apart"}),
            Arm("vibration", {head: "vibration", fusion: "Apart"}),
            Arm("both", {head: "fused"}),
            Arm("both_transformer", {head: "fused", fusion: "FusionTransformer"}),
        ),
        metric=AUROC,
        better="higher",
        claims=(
            Claim(
                *("both", "tile", ALARMS, "lower"),
                says="pictures and vibration have fewer false alarms, 1.7 % instead of 8.3 (an article on "
                "multimodal systems, without evidence)",
            ),
            Claim(*("both", "tile", AUROC, "higher"), says="both are better than the tile alone"),
            Claim(*("both", "vibration", AUROC, "higher"), says="and than the vibration alone"),
            Claim(*("both_transformer", "both", AUROC, "open"), says="which way to read both is better"),
        ),
        equal=("steps", "samples"),
        columns=(ALARMS, "val: balanced_accuracy"),
        says="Are there fewer false alarms if a machine is heard as well as its tiles are seen?",
    )


def get_config(choice: str = "tiles"):
    """The experiment of that name, with its options behind a comma."""
    return config.view(config.choose(choice, tiles, bearing))


def tiles():
    """Good tiles and those with a defect, each with a vibration."""
    image = ResNetConfig(
        stem_dim=16,
        stage_dims=(16, 32, 64),
        stage_blocks=(1, 1, 1),
        block="basic",
        statistics="moving",
        image_size=SIDE,
        pixel_mean=(0.5,) * 3,
        pixel_std=(0.25,) * 3,
    )
    head = Classification(("good", "defect"), name="state", field="state", stream="fused")
    towers = (Tower("image", image), Tower("vibration", VIBRATION, "vibration"))
    return _experiment(
        "inspection",
        JointConfig(towers, (head,), Mixing(dim=64, dropout=0.2)),
        _tiles("train", "train.json", _windows("1797", "1772", "1750")),
        _tiles("val", "val.json", _windows("1797_normal", "1730", part=(0.6, 1.0))),
        Labels(head="state", headline="auroc", positive="defect"),
        steps=300,
    )


def bearing(held_out: str = "21"):
    """Kinds of fault by vibration, on a diameter of fault that is not trained on."""
    if held_out not in DIAMETERS:
        raise ValueError(f"held_out={held_out}: expected one of {', '.join(DIAMETERS)}")
    faults = OnlyWith("fault", FAULTS)
    others = tuple(d for d in DIAMETERS if d != held_out)
    source = dataclasses.replace(_windows(), part=(0.0, 1.0))
    train, val = (
        dataclasses.replace(source, name=name, only=(faults, OnlyWith("diameter_mil", diameters)))
        for name, diameters in (("train", others), ("val", (held_out,)))
    )
    head = Classification(FAULTS, name="fault", field="fault", stream="vibration")
    model = JointConfig((Tower("vibration", VIBRATION, "vibration"),), (head,))
    task = Labels(head="fault", headline="balanced_accuracy", groups=("rpm",))
    return _experiment("bearing", model, train, val, task, steps=400)


def _windows(*keys, part=(0.0, 0.6)):
    """Windows of a part of those recordings whose keys begin so; without a key, of all."""
    kinds = ("normal_00", *(f"{fault}_{int(d):02d}" for fault in FAULTS for d in DIAMETERS))
    names = tuple(f"{rpm}_{kind}" for rpm in ("1797", "1772", "1750", "1730") for kind in kinds)
    chosen = tuple(name for name in names if name.startswith(keys)) if keys else names
    return RecordedWindowsConfig(
        "vibrations",
        "cwru_vibration/meta.json",
        "de_accelerometer.npz",
        medium="vibration",
        window=WINDOW,
        hop=WINDOW,
        part=part,
        only=(OnlyWith("key", chosen),),
        labels=("fault", "rpm", "diameter_mil"),
    )


def _tiles(name, file, vibrations):
    pictures = RecordsConfig("pictures", f"magnetic_tile/{file}", image="image", labels=("label",))
    kinds = (SameKind(("good",), ("normal",)), SameKind(("defect",), FAULTS))
    return MatchedConfig(
        name, JudgedConfig("judged", pictures), vibrations, ("state", "fault"), kinds, AGREEMENT
    )


def _experiment(name, model, train, val, task, *, steps):
    return Experiment(
        name=name,
        model=model,
        data=DataConfig(
            root="../shared/data",
            sources=(train,),
            evaluation=(val,),
            max_tokens=8,
            augmentation=AugmentationConfig(brightness=0.2, contrast=0.2, crop=0.3),
            tiling=TilingConfig(tile_size=SIDE, views="global"),
        ),
        stages=(
            Stage(
                "learn", steps=steps, batch_size=32, objective=Heads((model.heads[0].name,)), optimizer=RATE
            ),
        ),
        loop=LoopConfig(log_every=20, checkpoint_every=1000),
        evaluation=EvaluationConfig(task=task, batch_size=64),
    )
