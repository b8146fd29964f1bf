"""Emoji: draws one of a group that is asked for in English or Chinese, by rectified flow.

    python -m vl_jax train --config=experiments/emoji.py --workdir=runs/emoji
    python -m vl_jax predict --workdir=runs/emoji --head=picture --text=clock --save=clock.png

Ten groups, told from the names and keywords of the drawings; each is drawn equally often. Every sixth emoji
of a group is held out. The first stage trains a classifier of groups, the second the text tower and the head
that draws; the two share no parameter. ``--config=experiments/emoji.py:dit`` draws by a transformer in place
of a U-Net.
"""

import dataclasses
import json
import re
from pathlib import Path

from vl_jax import config
from vl_jax.data.config import DataConfig, LoadingConfig
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import TEXT, Sample, Turn, image_in
from vl_jax.encoders.resnet import ResNetConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.creations import Creations
from vl_jax.experiment import Experiment
from vl_jax.heads.classification import Classification
from vl_jax.heads.image.dit import DiTConfig
from vl_jax.heads.image.picture_flow import PictureFlow
from vl_jax.heads.image.unet import UNetConfig
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.denoising import Denoising
from vl_jax.train.objectives.heads import Heads
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

SIZE = 32
MAX_PIXELS = 1 << 20
# In both languages, with what their English names (before "|") or keywords match; the first rule counts.
GROUPS = {
    "flag": ("flag", "旗帜", r"^flag: .*\|"),
    "family": ("family", "家庭", r"^family: .*\|"),
    "clock": ("clock", "时钟", r"(o’clock|-thirty).*\|"),
    "heart": ("heart", "心", r"^(?!couple|anatomical|smiling|heart hands)[\w ]*\bhearts?\b.*\|"),
    "face": ("face", "脸", r"^(?!.*(wind|moon|sun|clock|animal|farm|pet)).*\bface\b.*\|.*\bface\b"),
    "animal": ("animal", "动物", r"\|.*\banimal\b"),
    "hand": ("hand", "手", r"^(?!.*(person|man|woman|face|men|women)).*\|.*\b(hand|finger)\b"),
    "zodiac": ("zodiac", "星座", r"^[A-Z]\w+\|.*\bzodiac\b"),
    "button": ("button", "按钮", r"^(?!.*(Japanese|BACK|END|ON!|SOON|TOP)).*(\bbutton|arrow|keycap).*\|"),
    "person": ("person", "人", r"^(man|woman|person|men|women)\b.*\|"),
}


@dataclasses.dataclass(frozen=True)
class GroupsConfig:
    """The emoji of some groups, with the word for the group as their text."""

    name: str
    groups: tuple[str, ...]
    held_out: bool = False  # those that are, or the others
    count: int = 0  # samples of a group, which goes round; 0: each emoji once in each language
    folder: str = ""  # of the data, in the root

    def open(self, root, *, orientation="shown"):
        """The samples."""
        return Groups(self, (Path(root) / self.folder).resolve(), orientation)


class Groups:
    """A sample for every emoji and language, group by group."""

    def __init__(self, source, root, orientation):
        self.root, self.orientation = root, orientation
        self.files = [root / "train.json", root / "val.json"]
        records = [r for file in self.files for r in json.loads(file.read_text(encoding="utf-8"))]
        self.samples = []
        for group in source.groups:
            images = [r["image"] for r in records if r["lang"] == "en" and group_of(r) == group]
            images = [name for i, name in enumerate(images) if (i % 6 == 5) == source.held_out]
            for i in range(source.count or 2 * len(images)):
                self.samples.append((group, images[i // 2 % len(images)], i % 2))

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        group, name, language = self.samples[index]
        where = f"sample {name} ({self.root})"
        image = image_in(self.root, name, where, MAX_PIXELS, self.orientation)
        turn = Turn("<image>\n", GROUPS[group][language], kind=TEXT, language=("en", "zh")[language])
        return Sample(f"{index} {name}", (turn,), (image,), labels={"label": group})


def group_of(record):
    """The group of an English record; None if it is in none."""
    text = f"{record['conversations'][1]['value']}|{' '.join(record['keywords'])}"
    return next((name for name, (_, _, rule) in GROUPS.items() if re.search(rule, text)), None)


def get_config(network: str = "unet"):
    """The experiment with a U-Net or a transformer."""
    return config.view(config.choose(network, unet, dit))


def unet():
    """Three levels."""
    return _experiment(UNetConfig())


def dit():
    """Four blocks on patches of 4 x 4 pixels."""
    return _experiment(DiTConfig())


def _experiment(network):
    text = TextEncoderConfig(
        vocab_size=2048,
        max_length=16,
        embed_dim=64,
        mlp_dim=128,
        num_layers=1,
        num_heads=4,
        activation="gelu_tanh",
        causal=False,
        projection_dim=0,
    )
    image = ResNetConfig(
        stem_dim=16, stage_dims=(32, 64, 96), stage_blocks=(1, 1, 1), block="basic", image_size=SIZE
    )
    rate = OptimizerConfig(method="muon", learning_rate=2e-3, warmup_steps=20, final_fraction=0.01)
    return Experiment(
        name="emoji",
        model=JointConfig(
            (Tower("text", text, "tokens"), Tower("image", image)),
            (PictureFlow(network=network, says="picture"), Classification(tuple(GROUPS))),
        ),
        data=DataConfig(
            root="../shared/data/twemoji_bilingual",
            sources=tuple(GroupsConfig(name, (name,)) for name in GROUPS),
            evaluation=(GroupsConfig("new", tuple(GROUPS), held_out=True, count=16),),
            max_tokens=16,
            augmentation=AugmentationConfig(crop=0.15, flip_rate=0.5),
            tiling=TilingConfig(tile_size=SIZE, views="global"),
            loading=LoadingConfig(cache_mb=64),
        ),
        stages=(
            Stage(
                "classify",
                steps=300,
                batch_size=32,
                trainable=("image/.*", "label/.*"),
                objective=Heads(),
                optimizer=rate,
            ),
            Stage(
                "draw",
                steps=800,
                batch_size=32,
                trainable=("text/.*", "picture/.*"),
                objective=Denoising(),
                optimizer=rate,
            ),
        ),
        loop=LoopConfig(log_every=20, checkpoint_every=500),
        evaluation=EvaluationConfig(task=Creations(), batch_size=64),
    )
