"""Levels of alignment: pictures with sentences, and beneath them regions with phrases and tokens with words.

    python -m vl_jax sweep --config=ablations/alignment_levels --sweep=alignment_levels --workdir=runs/levels

Scenes of two things have one sentence that says where each is, and labels say which words name what. What
counts is the share of held-out sentences whose picture is found first among 256, by the vectors of whole
pictures and sentences in every arm. ``ablations/alignment_levels:4`` is four times as long.
"""

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.sources.scenes import SceneTextsConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.retrieval import Retrieval
from vl_jax.heads.levels.regions import PhraseRegions
from vl_jax.heads.levels.tokens import TokenPairs
from vl_jax.heads.pairs import Pairs
from vl_jax.joint import JointConfig, Tower
from vl_jax.train.objectives.hierarchical import Hierarchical

RECALL = "heldout: text_to_image_recall_at_1"
_WEIGHTS = ("stages.pairs.objective.regions.weight", "stages.pairs.objective.words.weight")


def _levels(*weights: float) -> dict[str, float]:
    return dict(zip(_WEIGHTS, weights, strict=True))


def ablation_alignment_levels():
    """The whole alone; with words, with regions, with both."""
    return Ablation(
        arms=(
            Arm("whole", _levels(0.0, 0.0)),
            Arm("words", _levels(0.0, 1.0)),
            Arm("regions", _levels(1.0, 0.0)),
            Arm("all", _levels(1.0, 1.0)),
        ),
        metric=RECALL,
        better="higher",
        claims=(
            Claim(
                *("all", "whole", RECALL, "higher"),
                says="alignment on three levels is better than on one (an article on multimodal systems, "
                "without evidence)",
            ),
            Claim(
                *("words", "whole", RECALL, "higher"),
                says="tokens that look for words are better for retrieval (FILIP, arXiv 2111.07783, table 3)",
            ),
            Claim(*("regions", "whole", RECALL, "open"), says="regions have labels that the others lack"),
            Claim(*("all", "regions", RECALL, "open"), says="what words bring beside regions"),
        ),
        equal=("steps", "samples", "tokens", "parameters"),
        columns=("heldout: *recall_at_1", "*/loss"),
        says="Do levels beneath whole pictures and sentences help to find one by the other?",
    )


def _sentences(name: str, seed: int, num_examples: int = 1_000_000) -> SceneTextsConfig:
    options = {"num_colours": 8, "num_shapes": 6, "min_objects": 2}
    scenes = miniature.scenes("scenes", seed, num_examples, **options)
    return SceneTextsConfig(name, scenes, pictures=True, phrases=True)


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
    heads = (Pairs(dim=48), TokenPairs(dim=48), PhraseRegions(dim=48, size=miniature.SIDE, most=2))
    model = JointConfig(
        towers=(Tower("image", miniature.ENCODER), Tower("text", text, "tokens")), heads=heads
    )
    return config.view(
        miniature.experiment(
            scale,
            model=model,
            data=miniature.data(
                sources=(_sentences("train", 1),),
                evaluation=(_sentences("heldout", 2, num_examples=256),),
                max_tokens=32,
            ),
            stages=(miniature.stage("pairs", scale, steps=200, batch_size=32, objective=Hierarchical()),),
            evaluation=EvaluationConfig(task=Retrieval(), batch_size=64),
        )
    )
