"""Gradients of modalities: ways of fusing them against the sum, and against losses of single modalities.

    python -m vl_jax sweep --config=ablations/gradient_fusion --sweep=gradient_fusion --workdir=runs/fusion

A scene has one thing, and its shape is asked. Half of the sentences beside it say the shape, in words that
are soon learned; the others do not, and then the picture has to be looked at. So the text is ahead, and the
tower of pictures learns less than it could (Wang et al. 2020, arXiv 1905.12681).

Every arm has the same heads. In ``joint`` and ``ogm_ge`` those of single modalities are probes, which change
no tower. ``sum`` is the control that explains most published gains: their losses are added, and nothing is
done to gradients. ``at`` says whether a way acts on the gradient, where Adam cancels what is constant, or on
the update. ``ablations/gradient_fusion:4`` is four times as long.
"""

import dataclasses
import random

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, Turn
from vl_jax.data.sources.scene_text import SHAPE_NAMES
from vl_jax.data.sources.scenes import ScenesConfig, ScenesSource
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.labels import Labels
from vl_jax.fusion.gated_streams import GatedStreams
from vl_jax.heads.classification import Classification
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.objectives.heads import Heads

RIGHT = "heldout: accuracy"
_WAY = "stages.train.gradients"
_SINGLE = {f"model.heads.{name}.probe": False for name in ("of_image", "of_text")}


@dataclasses.dataclass(frozen=True)
class SaidShapes:
    """Scenes of one thing with a sentence that says its colour, and its shape in a share of the scenes."""

    name: str
    scenes: ScenesConfig
    told: float = 0.5  # share of the sentences that say the shape

    def open(self, root, *, orientation="shown"):
        """The source; it reads no file."""
        return _Said(self)


class _Said:
    def __init__(self, source):
        self._source, self._scenes = source, ScenesSource(source.scenes)

    def __len__(self):
        return len(self._scenes)

    def __getitem__(self, index):
        sample = self._scenes[index]
        (item,) = sample.images[0].scene.objects
        told = random.Random(f"told/{sample.id}").random() < self._source.told
        text = f"a {item.colour} {item.shape if told else 'thing'}"
        turn = Turn(f"{IMAGE_PLACEHOLDER}\n", text, TEXT, "en")
        labels = {"shape": item.shape, "told": "told" if told else "not told"}
        return dataclasses.replace(sample, turns=(turn,), labels=labels)


def _way(name, at, **fields):
    """A way of fusing the gradients of the joint loss and of single modalities."""
    return {_WAY: name, f"{_WAY}.at": at} | {f"{_WAY}.{key}": value for key, value in fields.items()}


def ablation_gradient_fusion():
    """The joint loss alone, the sum of losses, and five ways of fusing, on the update; OGM-GE on both."""
    probes = dict.fromkeys(_SINGLE, True)
    fixed = _way("Reweighted", "update", weights="(('image', 2.0), ('text', 0.5))")
    return Ablation(
        arms=(
            Arm("joint", probes),
            Arm("sum", _SINGLE),
            Arm("ogm_ge", {**probes, **_way("OGMGE", "update")}),
            Arm("ogm_ge_gradient", {**probes, **_way("OGMGE", "gradient")}),
            Arm("reweighted", {**_SINGLE, **fixed}),
            Arm("pcgrad", {**_SINGLE, **_way("PCGrad", "update")}),
            Arm("mmpareto", {**_SINGLE, **_way("MMPareto", "update")}),
            Arm("gradnorm", {**_SINGLE, **_way("GradNorm", "update")}),
        ),
        metric=RIGHT,
        better="higher",
        claims=(
            Claim(
                *("sum", "joint", RIGHT, "higher"),
                says="losses of single modalities help by themselves (BalanceBenchmark, arXiv 2502.10816: "
                "most of what is gained on sound and pictures)",
            ),
            Claim(
                *("mmpareto", "joint", RIGHT, "higher"),
                says="gradient fusion gives 12 % (an article on multimodal systems, without evidence)",
            ),
            Claim(*("mmpareto", "sum", RIGHT, "open"), says="what is left of it beside the control"),
            Claim(*("pcgrad", "sum", RIGHT, "open"), says="the same of PCGrad (arXiv 2001.06782)"),
            Claim(*("gradnorm", "sum", RIGHT, "open"), says="the same of GradNorm (arXiv 1711.02257)"),
            Claim(
                *("ogm_ge", "ogm_ge_gradient", RIGHT, "open"),
                says="OGM-GE (arXiv 2203.15332) on updates, and on gradients, where Adam cancels constants",
            ),
        ),
        equal=("steps", "samples", "tokens", "parameters"),
        columns=("heldout: *accuracy", "gradients/*"),
        says="Does fusing the gradients of modalities help, and more than their losses do?",
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
    shapes = Classification(SHAPE_NAMES, name="label", stream="fused", field="shape")
    model = JointConfig(
        towers=(Tower("image", miniature.ENCODER), Tower("text", text, "tokens")),
        fusion=GatedStreams(),
        heads=(
            shapes,
            dataclasses.replace(shapes, name="of_image", stream="image"),
            dataclasses.replace(shapes, name="of_text", stream="text"),
        ),
    )
    objective = Heads(("label", "of_image", "of_text"), modalities=("joint", "image", "text"))
    one = {"max_objects": 1, "num_colours": 8, "num_shapes": 6, "languages": ("en",), "kinds": ("shape",)}
    return config.view(
        miniature.experiment(
            scale,
            model=model,
            data=miniature.data(
                sources=(SaidShapes("train", miniature.scenes("scenes", 1, **one)),),
                evaluation=(SaidShapes("heldout", miniature.scenes("scenes", 2, 512, **one)),),
                max_tokens=16,
            ),
            stages=(miniature.stage("train", scale, steps=60, batch_size=32, objective=objective),),
            evaluation=EvaluationConfig(task=Labels(groups=("told",)), batch_size=64),
        )
    )
