"""Low-rank adapters: a model that knows scenes in English learns new colours and shapes, and Chinese.

    python -m vl_jax sweep --config=ablations/lora --sweep=lora_rank --workdir=runs/lora_rank
    python -m vl_jax sweep --config=ablations/lora --sweep=lora_targets --workdir=runs/lora_targets

The vectors of tokens train in every arm, since those of Chinese are new. ``ablations/lora:4`` is four times
as long.
"""

from vl_jax import config
from vl_jax.ablation import miniature
from vl_jax.ablation.miniature import LOSS
from vl_jax.ablation.plan import Ablation, Arm, Claim
from vl_jax.train.lora import LoraConfig

_ADAPT = "stages.adapt"


def ablation_lora_rank():
    """Adapters of rank 1, 4 and 16, each counting alike, and all weights."""
    return Ablation(
        arms=(
            *(
                Arm(f"rank_{rank}", {f"{_ADAPT}.lora.rank": rank, f"{_ADAPT}.lora.alpha": 2.0 * rank})
                for rank in (1, 4, 16)
            ),
            Arm("all_weights", {f"{_ADAPT}.lora": "None", f"{_ADAPT}.trainable": "('.*',)"}),
        ),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("all_weights", "rank_16", LOSS, "lower"),
                says="far from what was learned before, adapters learn less (Biderman et al. 2024, arXiv "
                "2405.09673, section 4)",
            ),
            Claim(
                *("rank_4", "rank_16", LOSS, "not_higher"),
                margin=0.05,
                says="ranks from 1 to 64 do about alike (LoRA, arXiv 2106.09685, table 6)",
            ),
            Claim("rank_1", "rank_16", LOSS, "open", says="the same"),
        ),
        equal=("steps", "samples", "tokens", "parameters"),
        says="Which rank is enough, and does it reach training of all weights?",
    )


def ablation_lora_targets():
    """Adapters of rank 8 on attention, on the experts, on what is dense, or on all of it."""
    names = {
        "attention": "('attention',)",
        "routed": "('routed',)",
        "dense": "('dense',)",
        "everything": "('attention', 'routed', 'dense')",
    }
    return Ablation(
        arms=tuple(Arm(name, {f"{_ADAPT}.lora.targets": targets}) for name, targets in names.items()),
        metric=LOSS,
        better="lower",
        claims=(
            Claim(
                *("routed", "attention", LOSS, "open"),
                says="nobody has published it for a model with experts; the adapters of experts are more "
                "numbers",
            ),
            Claim("dense", "attention", LOSS, "open"),
            Claim(
                *("everything", "attention", LOSS, "lower"),
                says="adapters on all matrices are better than on attention alone (QLoRA, arXiv 2305.14314, "
                "section 4)",
            ),
        ),
        equal=("steps", "samples", "tokens", "parameters"),
        says="Where do adapters belong in a model with experts?",
    )


def get_config(scale: str = "1"):
    """The experiment, ``scale`` times as long."""
    return config.view(miniature.adapting(scale, LoraConfig(rank=8, alpha=16.0)))
