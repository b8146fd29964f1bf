"""The groups that the fields of ``MoEConfig`` (see ``routing``) come in, each with the rules of its own."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Chosen:
    """How many experts there are, and who chooses among them; ``MoEConfig`` explains it."""

    scheme: str = "top_k"
    num_experts: int = 64
    top_k: int = 6
    expert_dim: int = 1408


def check_widths(widths: tuple[int, ...], matrices: int, *, by_width: bool) -> None:
    """Refuses widths that the experts with matrices cannot have in equal parts.

    Raises:
      ValueError: names them.
    """
    if widths and (min(widths) < 1 or matrices % len(widths)):
        raise ValueError(
            f"widths={widths} must be numbers >= 1, and as many of them as divide the {matrices} experts "
            "with matrices into equal parts"
        )
    if by_width and not widths:
        raise ValueError("balance.by_width=True needs widths, by which experts differ")


@dataclasses.dataclass(frozen=True)
class SharedExpertsConfig:
    """Experts that every token takes."""

    num: int = 2  # fused into one block
    dim: int | None = None  # width of that block; None: num * expert_dim
    gate: bool = False  # multiply its output by a learned sigmoid of the token (Qwen2-MoE)

    def __post_init__(self):
        if self.num < 0:
            raise ValueError(f"num={self.num} must be >= 0")


@dataclasses.dataclass(frozen=True)
class SimpleExpertsConfig:
    """The last of the routed experts, which multiply by no matrix; see ``moe.simple``."""

    zero: int = 0  # give nothing
    copy: int = 0  # give the token itself
    constant: int = 0  # give a learned vector, mixed with the token

    def __post_init__(self):
        if min(dataclasses.astuple(self)) < 0:
            raise ValueError(f"zero={self.zero}, copy={self.copy}, constant={self.constant} must be >= 0")

    @property
    def num(self) -> int:
        """How many there are."""
        return self.zero + self.copy + self.constant


@dataclasses.dataclass(frozen=True)
class GateConfig:
    """How much a chosen expert's output weighs."""

    score: Literal["softmax", "sigmoid"] | None = None  # None: the scheme's own, softmax for most
    normalize: bool = False  # divide the chosen gates by their sum; of one, that leaves 1
    scale: float = 1.0  # what gates are multiplied by in the end


@dataclasses.dataclass(frozen=True)
class ExpertGroupsConfig:
    """Experts in groups, of which a token may use a few only."""

    num: int = 1  # experts are cut into groups of equal size ...
    top: int = 1  # ... of which a token may use this many
    excluded: Literal["lowest", "zero"] = "lowest"  # selection score of experts in the other groups

    def __post_init__(self):
        if self.num < 1:
            raise ValueError(f"num={self.num} must be >= 1")
        if not 1 <= self.top <= self.num:
            raise ValueError(f"top={self.top} must be from 1 to num={self.num}")


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """What keeps the load of experts even, and logits small."""

    weight: float = 1e-3  # balance loss (0: none)
    # Tokens over which load is to be even: a row, the (micro-)batch, or the whole of the previous step.
    scope: Literal["sequence", "batch", "step"] = "sequence"
    z_weight: float = 0.0  # router z-loss (ST-MoE, arXiv 2202.08906)
    bias_rate: float = 1e-3  # step of the loss-free bias (arXiv 2408.15664)
    by_width: bool = False  # load counts by the width of an expert (HMoE, arXiv 2408.10681); see ``widths``
    # Routes are dealt out in turn and not chosen, so that load is even: the speed that balance can reach.
    forced: bool = False


@dataclasses.dataclass(frozen=True)
class CapacityConfig:
    """The most tokens an expert takes; without ``factor`` and ``slots`` there is no limit (dropless).

    A factor is read as a fraction with a denominator up to 10,000, so that 1.2 is 6/5 (see ``moe.slots``).
    """

    factor: float | None = None  # slots per expert over the mean load
    slots: int | None = None  # slots per expert and row, as a number
    # Who keeps a slot when they run out: see ``dispatch.slot_ranks``.
    priority: Literal["position", "gate", "rank"] = "position"

    def __post_init__(self):
        if self.factor is not None and not 0 < self.factor < math.inf:
            raise ValueError(f"factor={self.factor} must be > 0 and finite (None: dropless)")
        if self.slots is not None and self.slots < 1:
            raise ValueError(f"slots={self.slots} must be >= 1 (None: dropless, or by factor)")
        if self.slots is not None and self.factor is not None:
            raise ValueError(f"slots={self.slots} and factor={self.factor} exclude each other")


@dataclasses.dataclass(frozen=True)
class ExecutionConfig:
    """How the layer is computed: this depends on the machine, and leaves the model as it is."""

    # How tokens reach experts on other devices; ``all_to_all`` needs a ``limit``. See ``exchange``.
    exchange: Literal["all_gather", "ring", "all_to_all", "ragged"] = "all_gather"
    # See ``kernels.target.choose``.
    kernel: Literal["auto", "blocked", "pallas", "triton", "reference"] = "auto"
    # Rows that a device has room for at a time, over those that even load brings; others follow in another
    # round, and nothing is dropped. See ``rooms``.
    buffer: float = 1.25
    # With ``ragged``: parts of a device's tokens, one of which travels while experts work on another (None:
    # as many as leave an expert enough rows).
    chunks: int | None = None
    # With ``ragged``: groups of neighbours on the mesh axis ``expert``, such as slices. A token goes once to
    # each group it has experts in, and on from there.
    slices: int = 1

    def __post_init__(self):
        if not 1 <= self.buffer < math.inf:
            raise ValueError(f"buffer={self.buffer} must be >= 1 and finite")
        for name in ("chunks", "slices"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be >= 1")
        if self.exchange != "ragged" and (self.chunks is not None or self.slices > 1):
            raise ValueError(
                f"exchange={self.exchange!r} takes no chunks={self.chunks} and slices={self.slices}; "
                "'ragged' does"
            )
