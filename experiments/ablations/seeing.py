"""Experts in the encoder of pictures, where routing may look at all tokens of a picture at once.

    python -m vl_jax sweep --config=ablations/seeing --sweep=encoder_schemes --workdir=runs/encoder_schemes
    python -m vl_jax sweep --config=ablations/seeing --sweep=batch_priority --workdir=runs/batch_priority
    python -m vl_jax sweep --config=ablations/seeing --sweep=slot_order --workdir=runs/slot_order
    python -m vl_jax sweep --config=ablations/seeing --sweep=capacity --workdir=runs/capacity

A picture has 16 patches, and is a routing group. ``ablations/seeing:4`` is four times as long.
"""

from vl_jax import config
from vl_jax.ablation.miniature import EQUAL, LOSS, SEEING, experiment
from vl_jax.ablation.plan import Ablation, Arm, Claim

MOE = "model.encoder.moe"
_DROPS = "routing/drop_rate_mean"


def ablation_encoder_schemes():
    """Tokens choose experts, experts choose tokens, or all are mixed; and a dense layer of the same work."""
    return Ablation(
        arms=(
            Arm("dense", {MOE: "None", "model.encoder.sparse_layers": "()"}),
            Arm("token_choice", {f"{MOE}.scheme": "top_k"}),
            Arm("expert_choice", {f"{MOE}.scheme": "expert_choice"}),
            # Eight experts with four slots each: as many rows as 16 tokens that take two experts each.
            Arm("soft", {f"{MOE}.scheme": "soft_moe", f"{MOE}.options": "(('slots', 4.0),)"}),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("expert_choice", "token_choice", LOSS, "lower"),
                says="experts that choose learn faster (Zhou et al. 2022, arXiv 2202.09368, section 4.2)",
            ),
            Claim(
                *("soft", "token_choice", LOSS, "lower"),
                says="soft experts are better than tokens that choose, and than experts that choose "
                "(Puigcerver et al. 2023, arXiv 2308.00951, section 3)",
            ),
            Claim("soft", "expert_choice", LOSS, "open", says="the same paper has soft experts ahead"),
            Claim(
                "token_choice",
                "dense",
                LOSS,
                "lower",
                says="sparse is better (V-MoE, arXiv 2106.05974, section 3)",
            ),
        ),
        equal=("steps", "tokens", "flops"),
        tolerance=0.05,
        says="Who should choose in an encoder: tokens, experts, or nobody?",
    )


def ablation_batch_priority():
    """With half of the slots that tokens ask for: who keeps one, the first or those that want it most?"""
    half = {f"{MOE}.limit.factor": 0.5}
    return Ablation(
        arms=(
            Arm("position", {**half, f"{MOE}.limit.priority": "position"}),
            Arm("gate", {**half, f"{MOE}.limit.priority": "gate"}),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("gate", "position", LOSS, "lower"),
                says="with few slots, those that want them most should have them: batch-priority routing "
                "(V-MoE, arXiv 2106.05974, section 4)",
            ),
            Claim("gate", "position", _DROPS, "open"),
        ),
        equal=EQUAL,
        says="Who should keep a slot when there are too few?",
    )


def ablation_slot_order():
    """As many slots as tokens ask for: one token after the other, or first choices before any second."""
    tight = {f"{MOE}.limit.factor": 1.0}
    return Ablation(
        arms=(
            Arm("position", {**tight, f"{MOE}.limit.priority": "position"}),
            Arm("rank", {**tight, f"{MOE}.limit.priority": "rank"}),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("rank", "position", LOSS, "open"),
                says="GShard (arXiv 2006.16668, algorithm 1) and V-MoE (arXiv 2106.05974, algorithm 1) serve "
                "first choices first; neither shows what it gains",
            ),
            Claim("rank", "position", _DROPS, "open"),
        ),
        equal=EQUAL,
        says="Should first choices have slots before any second choice?",
    )


def ablation_capacity():
    """Half as many slots as tokens ask for, just as many, twice as many, or no limit."""
    arms = [("half", 0.5), ("one", 1.0), ("two", 2.0), ("dropless", "None")]
    return Ablation(
        arms=tuple(Arm(name, {f"{MOE}.limit.factor": factor}) for name, factor in arms),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("half", "dropless", LOSS, "higher"),
                says="many dropped tokens cost quality (V-MoE, arXiv 2106.05974, section 4.1)",
            ),
            Claim(
                *("one", "dropless", LOSS, "open"),
                says="dropping nothing is a small and steady gain (arXiv 2605.11689); Switch saw little of "
                "it from 1.25 on (arXiv 2101.03961, table 1)",
            ),
            Claim("two", "dropless", LOSS, "open"),
            Claim("one", "half", _DROPS, "lower", says="more slots, fewer drops: this one has to hold"),
        ),
        equal=("steps", "tokens", "parameters"),
        says="How many slots do experts need?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    return config.view(experiment(scale, model=SEEING))
