"""How much looking may be left out? A gate between pictures and text, with budgets from nothing to all.

    python -m vl_jax sweep --config=ablations/gate_budget --sweep=gate_budget --workdir=runs/gate_budget
    python -m vl_jax sweep --config=ablations/gate_budget --sweep=gate_grain --workdir=runs/gate_grain

Half of the questions of the training say their answer themselves, so there is nothing to look at; all come
with a picture. ``seeing`` are questions that need it, ``said`` the others, and ``heldout`` has both kinds,
about one in six of them said. Samples decide: in one short run with ``grain="layer"`` half a budget closed
one of the two layers for all questions alike.
``ablations/gate_budget:4`` is four times as long.
"""

import dataclasses

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.miniature import LOSS
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.data.config import ConversationConfig
from vl_jax.fusion.budget import BudgetConfig
from vl_jax.fusion.gate import CrossModalGateConfig
from vl_jax.model import FusionConfig

BUDGET = "model.fusion.gate.budget"
SEEING, SAID, OPEN = "seeing: loss", "said: loss", "gate/open"
KINDS = ("colour", "shape", "position")  # of questions that need the picture


def ablation_gate_budget():
    """Nothing, a quarter, half, three quarters or all of the looks; the loss of each is the curve."""
    return Ablation(
        arms=tuple(
            Arm(name, {f"{BUDGET}.share": share})
            for name, share in (
                ("all", 1.0),
                ("three_quarters", 0.75),
                ("half", 0.5),
                ("quarter", 0.25),
                ("nothing", 0.0),
            )
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("half", "all", LOSS, "not_higher"),
                margin=0.03,
                says="half of the questions need no picture, so half of the looks should do",
            ),
            Claim("quarter", "all", LOSS, "open"),
            Claim(
                "nothing", "all", SEEING, "higher", says="whoever never looks cannot know: this has to hold"
            ),
            Claim("half", "all", OPEN, "lower", says="the budget is kept: this has to hold"),
        ),
        equal=("steps", "samples", "tokens", "parameters"),
        columns=(SEEING, SAID, OPEN),
        says="How much looking can be left out, where half of the questions need none?",
    )


def ablation_gate_grain():
    """At half of the looks: who should decide, and should it be trained soft or hard?"""
    return Ablation(
        arms=tuple(
            Arm(f"{grain}_{'hard' if hard else 'soft'}", {f"{BUDGET}.grain": grain, f"{BUDGET}.hard": hard})
            for grain in ("layer", "sample", "token")
            for hard in (False, True)
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim("sample_soft", "layer_soft", LOSS, "open"),
            Claim("token_soft", "layer_soft", LOSS, "open"),
            Claim("layer_hard", "layer_soft", LOSS, "open"),
            Claim("token_hard", "token_soft", LOSS, "open"),
        ),
        equal=("steps", "samples", "tokens"),
        columns=(SEEING, SAID, OPEN),
        says="Who should decide whether to look: the sample, each layer, or every token?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    gate = CrossModalGateConfig(num_heads=2, head_dim=24, opens=False, budget=BudgetConfig("sample"))

    def source(name: str, seed: int, kinds: tuple[str, ...], count: int = 1_000_000):
        return miniature.scenes(name, seed, count, kinds=kinds, languages=("en",))

    return config.view(
        miniature.experiment(
            scale,
            model=dataclasses.replace(miniature.MODEL, fusion=FusionConfig("gated", gate)),
            data=miniature.data(
                sources=(source("look", 1, KINDS), source("told", 1, ("said",))),
                evaluation=(
                    source("heldout", 2, (*KINDS, "said"), 256),
                    source("seeing", 3, KINDS, 256),
                    source("said", 3, ("said",), 256),
                ),
                # A row decides for one question, which takes 26 tokens at most, 3 of them of the answer.
                conversation=ConversationConfig(max_turns=1, turn_sampling="uniform"),
                max_tokens=32,
                max_answer_tokens=4,
            ),
            # With one question a row instead of three, rows are cheap.
            stages=(
                miniature.stage("train", scale, steps=300, sources=("look", "told"), weights=(1.0, 1.0)),
            ),
        )
    )
