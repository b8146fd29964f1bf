"""Pictures and sentences, found by one another: the sigmoid loss against the softmax.

    python -m vl_jax sweep --config=ablations/contrastive --sweep=pair_loss --workdir=runs/pair_loss
    python -m vl_jax sweep --config=ablations/contrastive --sweep=sigmoid_bias --workdir=runs/sigmoid_bias

What counts is the share of held-out sentences whose picture is found first among 256.
``ablations/contrastive:4`` is four times as long.
"""

import math

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.sources.scenes import SceneTextsConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.retrieval import Retrieval
from vl_jax.heads.pairs import Pairs
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.objectives.contrastive import ContrastivePairs

RECALL = "heldout: text_to_image_recall_at_1"
_STAGE, _HEAD = "stages.pairs", "model.heads.pairs"
_SOFTMAX = {f"{_STAGE}.objective.loss": "softmax"}
_SIGMOID = {
    f"{_STAGE}.objective.loss": "sigmoid",
    f"{_HEAD}.bias": True,
    f"{_HEAD}.initial_scale": math.log(10),
}


def ablation_pair_loss():
    """SigLIP's loss and CLIP's, with 16 and with 64 pairs in a batch, in as many steps."""
    few = {f"{_STAGE}.batch_size": 16}
    return Ablation(
        arms=(
            Arm("softmax_16", {**_SOFTMAX, **few}),
            Arm("sigmoid_16", {**_SIGMOID, **few}),
            Arm("softmax_64", {**_SOFTMAX, f"{_STAGE}.batch_size": 64}),
            Arm("sigmoid_64", {**_SIGMOID, f"{_STAGE}.batch_size": 64}),
        ),
        metric=RECALL,
        better="higher",
        claims=(
            Claim(
                *("sigmoid_16", "softmax_16", RECALL, "higher"),
                says="the sigmoid loss is better in small batches (SigLIP, arXiv 2303.15343, section 4); "
                "its smallest are of 512 pairs",
            ),
            Claim(
                "sigmoid_64", "softmax_64", RECALL, "open", says="the lead shrinks as batches grow (the same)"
            ),
        ),
        equal=("steps", "parameters"),
        tolerance=0.01,
        says="Is the sigmoid loss better than the softmax, and does that depend on the batch?",
    )


def ablation_sigmoid_bias():
    """The sigmoid loss with the published bias at the start, or none, which begins by pushing all apart."""
    return Ablation(
        arms=(
            Arm("minus_ten", {**_SIGMOID, f"{_HEAD}.initial_bias": -10.0}),
            Arm("zero", {**_SIGMOID, f"{_HEAD}.initial_bias": 0.0}),
        ),
        metric=RECALL,
        better="higher",
        claims=(
            Claim(
                *("minus_ten", "zero", RECALL, "higher"),
                says="a bias of -10 at the start is better than 0 (SigLIP, arXiv 2303.15343, on the bias)",
            ),
        ),
        equal=("steps", "samples", "tokens", "parameters", "flops"),
        says="Should the sigmoid loss begin with a bias for 'these do not belong together'?",
    )


def _captions(name: str, seed: int, num_examples: int = 1_000_000) -> SceneTextsConfig:
    scenes = miniature.scenes("scenes", seed, num_examples, num_colours=8, num_shapes=6)
    return SceneTextsConfig(name, scenes, pictures=True)


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    text = TextEncoderConfig(
        vocab_size=2048,
        max_length=32,
        embed_dim=48,
        mlp_dim=96,
        num_layers=1,
        num_heads=2,
        activation="gelu_tanh",
        causal=False,
        projection_dim=0,
    )
    model = JointConfig(
        towers=(Tower("image", miniature.ENCODER), Tower("text", text, "tokens")),
        heads=(Pairs(dim=48, bias=True),),
    )
    return config.view(
        miniature.experiment(
            scale,
            model=model,
            data=miniature.data(
                sources=(_captions("train", 1),),
                evaluation=(_captions("heldout", 2, num_examples=256),),
                max_tokens=32,
            ),
            stages=(miniature.stage("pairs", scale, objective=ContrastivePairs()),),
            evaluation=EvaluationConfig(task=Retrieval(), batch_size=64),
        )
    )
