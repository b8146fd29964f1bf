"""Ill-matched pairs: what wrong captions cost, and what it brings to drop the pairs that agree least.

    python -m vl_jax sweep --config=ablations/noisy_pairs --sweep=noisy_pairs --workdir=runs/noisy_pairs

A known share of the training scenes has the sentence of another scene. A first stage learns from all pairs;
in the second, in half of the arms, the share of a batch that the model finds least alike counts in no loss.
What is held out is clean. ``ablations/noisy_pairs:4`` is four times as long.
"""

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


def _arm(name: str, mixed_up: float, drop: float) -> Arm:
    return Arm(name, {"data.sources.train.mixed_up": mixed_up, "stages.filter.objective.drop": drop})


def ablation_noisy_pairs():
    """No wrong captions, 20 and 40 % of them; with and without as many pairs dropped."""
    return Ablation(
        arms=(
            _arm("clean", 0.0, 0.0),
            _arm("clean_dropped", 0.0, 0.2),
            _arm("noise_20", 0.2, 0.0),
            _arm("noise_20_dropped", 0.2, 0.2),
            _arm("noise_40", 0.4, 0.0),
            _arm("noise_40_dropped", 0.4, 0.4),
        ),
        metric=RECALL,
        better="higher",
        claims=(
            Claim(
                *("noise_20_dropped", "noise_20", RECALL, "higher"),
                says="ill-matched pairs are better left out (an article on multimodal systems, without "
                "evidence)",
            ),
            Claim(*("noise_40_dropped", "noise_40", RECALL, "higher"), says="also where there are many"),
            Claim(*("noise_40", "clean", RECALL, "lower"), says="wrong captions harm"),
            Claim(*("clean_dropped", "clean", RECALL, "open"), says="what it costs where no pair is wrong"),
        ),
        equal=("steps", "samples", "parameters"),
        tolerance=0.01,
        columns=("heldout: *recall_at_1",),
        says="Does it help to leave out the pairs that agree least?",
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
        towers=(Tower("image", miniature.ENCODER), Tower("text", text, "tokens")), heads=(Pairs(dim=48),)
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
            stages=(
                miniature.stage("learn", scale, steps=150, batch_size=64, objective=ContrastivePairs()),
                miniature.stage("filter", scale, steps=150, batch_size=64, objective=ContrastivePairs()),
            ),
            evaluation=EvaluationConfig(task=Retrieval(), batch_size=64),
        )
    )
