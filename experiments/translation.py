"""Translation: an encoder-decoder with experts (the Switch Transformer) turns English into Chinese, and back.

    python -m vl_jax train --config=experiments/translation.py --workdir=runs/translation

The texts describe procedural scenes: which objects, of which colour, in which place, and a written word. A
sample is one description in one language, and its answer the same description in the other. Scenes of the
held-out sources are none of the training's. ``SceneTranslation`` is a source in a file of one's own.
"""

from __future__ import annotations

import dataclasses
import random

from vl_jax import config
from vl_jax.data.config import ConversationConfig, DataConfig
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import Sample, Turn
from vl_jax.data.sources.scene_text import make_turns
from vl_jax.data.sources.scenes import ScenesConfig, make_scene
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.experiment import Experiment
from vl_jax.kernels.activation import Activation
from vl_jax.language.encoder_decoder import EncoderDecoderConfig, StackConfig
from vl_jax.language.text_to_text import TextToTextConfig
from vl_jax.moe.config import BalanceConfig, SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.train.loop import LoopConfig
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

LANGUAGES = ("en", "zh")
MODEL = TextToTextConfig(
    network=EncoderDecoderConfig(
        vocab_size=2048,
        embed_dim=96,
        mlp_dim=192,
        num_heads=4,
        head_dim=24,
        encoder=StackConfig(2, (1,)),
        decoder=StackConfig(2, (1,)),
        num_buckets=32,
        max_distance=64,
        route_padding=False,
    ),
    moe=MoEConfig(
        scheme="switch",
        num_experts=8,
        top_k=1,
        expert_dim=192,
        shared=SharedExpertsConfig(num=0),
        activation=Activation("relu", gated=False),
        balance=BalanceConfig(weight=1e-2),
    ),
)


@dataclasses.dataclass(frozen=True)
class SceneTranslation:
    """Descriptions of scenes in one language, to be written in the other."""

    name: str
    scenes: ScenesConfig = ScenesConfig("scenes")  # whose descriptions they are

    def open(self, root: str, *, orientation: str = "shown") -> Translations:
        """The source; it reads no file and draws no picture."""
        return Translations(self)


class Translations:
    """Random access to descriptions and their translations."""

    def __init__(self, config: SceneTranslation):
        self._config = config

    def __len__(self) -> int:
        return self._config.scenes.num_examples

    def __getitem__(self, index: int) -> Sample:
        """The description of one scene, in the language whose turn it is."""
        scenes = self._config.scenes
        rng = random.Random(f"translation/{scenes.seed}/{scenes.first + index}")
        scene = make_scene(scenes, rng)
        texts = {
            language: make_turns(scene, kinds=("caption",), languages=(language,), rng=rng)[0].answer
            for language in LANGUAGES
        }
        source, target = LANGUAGES if index % 2 == 0 else LANGUAGES[::-1]
        turn = Turn(texts[source], texts[target], kind=f"{source} to {target}", language=target)
        return Sample(id=f"{self._config.name}-{index}", turns=(turn,))


def translations(name: str, seed: int, num_examples: int = 1_000_000) -> SceneTranslation:
    """Two or three objects on a grid of nine places, and mostly a word."""
    return SceneTranslation(
        name, ScenesConfig("scenes", num_examples, seed, min_objects=2, max_objects=3, num_words=8)
    )


def sweep_scheme():
    """Routing schemes on equal terms, in both stacks."""
    for scheme in ("switch", "top_k", "loss_free"):
        yield {"model.moe.scheme": scheme}


def get_config():
    """The experiment; every field can be set on the command line."""
    return config.view(
        Experiment(
            name="translation",
            model=MODEL,
            data=DataConfig(
                sources=(translations("train", 1),),
                evaluation=(translations("heldout", 2, num_examples=400),),
                max_tokens=64,
                max_answer_tokens=32,
                conversation=ConversationConfig(max_turns=1),
                tiling=TilingConfig(tile_size=1, views="global"),
            ),
            stages=(
                Stage(
                    "translate",
                    steps=800,
                    batch_size=32,
                    optimizer=OptimizerConfig(
                        method="muon", learning_rate=3e-3, warmup_steps=30, final_fraction=0.03
                    ),
                ),
            ),
            loop=LoopConfig(log_every=10, routing_every=50, checkpoint_every=400),
            evaluation=EvaluationConfig(batch_size=100, max_new_tokens=32),
        )
    )
