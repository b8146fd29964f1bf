"""The weight of the loss of pictures beside that of texts: is 0.7 best for classification?

    python -m vl_jax sweep --config=ablations/vision_weight --sweep=vision_weight --workdir=runs/vision_weight

One stream, of a text that looks at its picture, says the shape of the thing in the picture and the colour
that the sentence says; the two losses share all but their heads. They weigh w and 1 - w. What counts is how
often the shape is right; the other stands beside it. ``ablations/vision_weight:4`` is four times as long.
"""

import dataclasses

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, Turn
from vl_jax.data.sources.scene_text import COLOUR_NAMES, SHAPE_NAMES
from vl_jax.data.sources.scenes import ScenesConfig, ScenesSource
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.fusion.gated_streams import GatedStreams
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.objectives.heads import Heads

RIGHT = "heldout: accuracy"
SHARES = (0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True)
class ShownAndSaid:
    """Scenes of one thing, whose shape is shown and whose colour is said."""

    name: str
    scenes: ScenesConfig

    def open(self, root, *, orientation="shown"):
        """The source; it reads no file."""
        return _ShownAndSaid(self.scenes)


class _ShownAndSaid:
    def __init__(self, scenes):
        self._scenes = ScenesSource(scenes)

    def __len__(self):
        return len(self._scenes)

    def __getitem__(self, index):
        sample = self._scenes[index]
        (item,) = sample.images[0].scene.objects
        turn = Turn(f"{IMAGE_PLACEHOLDER}\n", f"something {item.colour} is here", TEXT, "en")
        return dataclasses.replace(sample, turns=(turn,), labels={"shape": item.shape, "said": item.colour})


def ablation_vision_weight():
    """A weight of 0.3, 0.5, 0.7 and 0.9 for the loss of the shape, and the rest for the other."""
    weights = "stages.train.objective.loss_weights"
    arms = {f"vision_{share:g}".replace(".", "_"): share for share in SHARES}
    return Ablation(
        arms=tuple(Arm(name, {weights: f"({w}, {1 - w:.1f})"}) for name, w in arms.items()),
        metric=RIGHT,
        better="higher",
        claims=tuple(
            Claim(
                *("vision_0_7", other, RIGHT, "higher"),
                says="a weight of 0.7 for vision is best for classification (an article on multimodal "
                "systems, without evidence)",
            )
            for other in arms
            if other != "vision_0_7"
        ),
        equal=("steps", "samples", "tokens", "parameters", "flops"),
        columns=("heldout: *accuracy", "*/accuracy"),
        says="Is 0.7 the best weight for the loss of pictures?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    text = TextEncoderConfig(
        vocab_size=2048,
        max_length=16,
        embed_dim=48,
        mlp_dim=96,
        num_layers=1,
        num_heads=2,
        activation="gelu_tanh",
        causal=False,
        projection_dim=0,
    )
    heads = (
        Classification(SHAPE_NAMES, name="label", stream="fused", field="shape"),
        Classification(COLOUR_NAMES, name="said", stream="fused", field="said"),
    )
    model = JointConfig(
        towers=(Tower("image", miniature.ENCODER), Tower("text", text, "tokens")),
        fusion=GatedStreams(),
        heads=heads,
    )
    one = {"max_objects": 1, "num_colours": 8, "num_shapes": 6, "languages": ("en",), "kinds": ("shape",)}
    objective = Heads(("label", "said"), loss_weights=(0.5, 0.5))
    return config.view(
        miniature.experiment(
            scale,
            model=model,
            data=miniature.data(
                sources=(ShownAndSaid("train", miniature.scenes("scenes", 1, **one)),),
                evaluation=(ShownAndSaid("heldout", miniature.scenes("scenes", 2, 512, **one)),),
                max_tokens=16,
            ),
            stages=(miniature.stage("train", scale, steps=60, batch_size=32, objective=objective),),
            evaluation=EvaluationConfig(task=Labels(groups=()), batch_size=64),
        )
    )
