"""Experts and modalities: entropy losses for each, and experts that are kept for one of them.

    python -m vl_jax sweep --config=ablations/modalities --sweep=entropies --workdir=runs/entropies
    python -m vl_jax sweep --config=ablations/modalities --sweep=partition --workdir=runs/partition

Pictures and questions go through one decoder. ``ablations/modalities:4`` is four times as long.
"""

from vl_jax import config
from vl_jax.ablation.miniature import EQUAL, INFORMATION, LOSS, MAXVIO, experiment
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.batch import MODALITIES

_MOE = "model.moe"


def _entropies(*scopes: str) -> dict:
    weights = [(f"{modality}_{scope}_entropy", 0.04) for modality in MODALITIES for scope in scopes]
    return {f"{_MOE}.balance.weight": 0.0, f"{_MOE}.options": str((*weights, ("min_experts", 6.0)))}


def ablation_entropies():
    """A balance loss that knows no modality; or entropies for each: of tokens, of their mean, of both."""
    return Ablation(
        arms=(
            Arm("none", {f"{_MOE}.balance.weight": 0.0}),
            Arm("balance", {f"{_MOE}.balance.weight": 1e-2}),
            Arm("local", _entropies("local")),
            Arm("global", _entropies("global")),
            Arm("both", _entropies("local", "global")),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("both", "none", MAXVIO, "lower"),
                says="entropy losses keep every modality's experts in use (LIMoE, arXiv 2206.02770, section "
                "2.2)",
            ),
            Claim(
                *("local", "both", MAXVIO, "higher"),
                says="sure tokens alone crowd into few experts: the global loss is what spreads them (the "
                "same)",
            ),
            Claim(
                *("both", "balance", LOSS, "open"),
                says="classic losses alone are not enough with two modalities (the same, section 4)",
            ),
            Claim("both", "balance", INFORMATION, "open"),
            Claim("both", "global", LOSS, "open"),
        ),
        equal=EQUAL,
        says="Do entropy losses for each modality do better than one balance loss?",
    )


def ablation_partition():
    """All eight experts for all tokens, or two, four or six of them for pictures and the rest for text."""
    return Ablation(
        arms=(
            Arm("mixed", {f"{_MOE}.scheme": "top_k"}),
            *(
                Arm(
                    f"vision_{number}",
                    {
                        f"{_MOE}.scheme": "modality_top_k",
                        f"{_MOE}.options": str((("vision_experts", float(number)),)),
                    },
                )
                for number in (2, 4, 6)
            ),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("vision_2", "mixed", LOSS, "open"),
                says="experts of one modality save work (MoMa, arXiv 2407.21770, section 4); which share is "
                "best depends on what the modalities have in common, so nothing is declared",
            ),
            Claim("vision_4", "mixed", LOSS, "open", says="four and four, as in MoMa"),
            Claim("vision_6", "mixed", LOSS, "open"),
        ),
        equal=EQUAL,
        says="How many experts should be kept for pictures, if any?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    return config.view(experiment(scale))
