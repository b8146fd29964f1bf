"""Hard negatives of contrastive training: harder texts of a batch count more, wrong ones are added, or both.

    python -m vl_jax sweep --config=ablations/negatives --sweep=negatives --workdir=runs/negatives

Scenes of two things have one sentence each: "a red circle left of a blue square". A wrong text says the same
of a scene in which the two have exchanged colour, shape or place. Beside the share of held-out sentences that
are nearer to their picture than a wrong one stands what a blind model of the sentences has: a half, as wrong
ones are true of other scenes. ``ablations/negatives:4`` is four times as long.
"""

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.config import ConversationConfig
from vl_jax.data.sources.negatives import NegativesConfig
from vl_jax.data.sources.scenes import SceneTextsConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.retrieval import Retrieval
from vl_jax.heads.pairs import Pairs
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.objectives.contrastive import ContrastivePairs

APART, RECALL = "heldout: told_apart", "heldout: text_to_image_recall_at_1"
_HARDNESS, _WRONG = "stages.pairs.objective.hardness", "stages.pairs.objective.negatives"


def ablation_negatives():
    """None, harder ones of the batch, wrong texts, or both."""
    return Ablation(
        arms=(
            Arm("none", {_HARDNESS: 0.0, _WRONG: False}),
            Arm("in_batch", {_HARDNESS: 0.25, _WRONG: False}),
            Arm("swapped", {_HARDNESS: 0.0, _WRONG: True}),
            Arm("both", {_HARDNESS: 0.25, _WRONG: True}),
        ),
        metric=APART,
        better="higher",
        claims=(
            Claim(
                *("swapped", "none", APART, "higher"),
                says="wrong texts as negatives teach what belongs to what (NegCLIP, arXiv 2210.01936)",
            ),
            Claim(
                *("swapped", "none", RECALL, "not_lower"),
                margin=0.03,
                says="and retrieval is no worse for it (the same)",
            ),
            Claim(
                *("in_batch", "none", RECALL, "higher"),
                says="negatives weighted by how hard they are are better for retrieval (arXiv 2301.02280; "
                "2010.04592 for pictures alone)",
            ),
            Claim(
                *("in_batch", "none", APART, "open"), says="a batch has few texts that differ in one thing"
            ),
            Claim(*("both", "swapped", APART, "open"), says="nobody says what the two give together"),
        ),
        equal=("steps", "samples", "parameters"),
        columns=("heldout: *told_apart", "heldout: *recall_at_1", "heldout: *pool"),
        says="Do hard negatives teach a model what belongs to what?",
    )


def _sentences(name: str, seed: int, num_examples: int = 1_000_000) -> SceneTextsConfig:
    options = {"num_colours": 8, "num_shapes": 6, "min_objects": 2, "grid": 3}
    scenes = miniature.scenes("scenes", seed, num_examples, **options)
    return SceneTextsConfig(name, scenes, pictures=True, relations=True, negatives=True)


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
        towers=(Tower("image", miniature.ENCODER), Tower("text", text, "tokens")), heads=(Pairs(dim=48),)
    )
    return config.view(
        miniature.experiment(
            scale,
            model=model,
            data=miniature.data(
                sources=(_sentences("train", 1),),
                evaluation=(_sentences("heldout", 2, num_examples=256),),
                max_tokens=32,
                conversation=ConversationConfig(negatives=NegativesConfig()),
            ),
            stages=(miniature.stage("pairs", scale, steps=300, batch_size=64, objective=ContrastivePairs()),),
            evaluation=EvaluationConfig(task=Retrieval(first="told_apart"), batch_size=64),
        )
    )
