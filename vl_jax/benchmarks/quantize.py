"""How much memory a training step needs: of all weights, of adapters, and of adapters over weights in int8.

Nothing is trained: the steps are compiled for shapes alone, and the compiler says what each needs. A small
decoder with experts stands for a large one; every layer keeps only its input for the backward pass, so that
the sides differ in their weights alone.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vl_jax import sharding
from vl_jax.benchmarks.step import machine, text_batch
from vl_jax.compress import quantize
from vl_jax.language.decoder import DecoderConfig
from vl_jax.language.gqa import GQAConfig
from vl_jax.layout import plan_layout
from vl_jax.model import VisionLanguageConfig
from vl_jax.moe.config import SharedExpertsConfig
from vl_jax.moe.routing import MoEConfig
from vl_jax.nn.low_rank import Only
from vl_jax.sharding import MeshConfig, make_mesh
from vl_jax.train.lora import LoraConfig
from vl_jax.train.program import Program
from vl_jax.train.stages import Stage

FULL, FIRST = "all weights", "adapters"


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured."""

    width: int = 512
    layers: int = 4
    num_experts: int = 16
    expert_dim: int = 512
    vocab_size: int = 2048
    rows: int = 4
    length: int = 128
    rank: int = 8
    chosen: int = 4  # experts that have adapters where not all have

    @property
    def model(self) -> VisionLanguageConfig:
        """A decoder of sparse layers."""
        attention = GQAConfig(num_heads=8, num_kv_heads=8, head_dim=self.width // 8)
        return VisionLanguageConfig(
            encoder=None,
            language=DecoderConfig(
                vocab_size=self.vocab_size,
                embed_dim=self.width,
                num_layers=self.layers,
                num_dense_layers=0,
                attention=attention,
                remat="full",
            ),
            moe=MoEConfig(
                num_experts=self.num_experts,
                top_k=2,
                expert_dim=self.expert_dim,
                shared=SharedExpertsConfig(num=0),
            ),
        )

    @property
    def stages(self) -> dict[str, Stage]:
        """A stage for each side, by its name."""
        lora = LoraConfig(rank=self.rank, alpha=2.0 * self.rank, targets=("attention", "routed"))
        few = Only(experts=tuple(range(self.chosen)))
        sides = {
            FULL: None,
            FIRST: lora,
            "adapters, int8": dataclasses.replace(lora, base="int8"),
            f"adapters of {self.chosen} experts, int8": dataclasses.replace(lora, base="int8", only=few),
        }
        trainable = {True: (".*",), False: ()}
        return {
            name: Stage("measured", steps=1, batch_size=self.rows, trainable=trainable[one is None], lora=one)
            for name, one in sides.items()
        }


def run(*, json_file: Path | None = None, sizes: Sizes | None = None) -> dict[str, Any]:
    """Compiles, prints a table and returns the figures.

    Args:
      json_file: where the figures go too.
    """
    sizes = sizes or Sizes()
    mesh = make_mesh(MeshConfig(1, 1, 1, 1), devices=jax.devices()[:1])
    tokens = np.ones((sizes.rows, sizes.length + 1), np.int32)
    batch = text_batch(sizes.model, tokens[:, :-1], tokens[:, 1:])
    layout = plan_layout(sizes.model, batch, mesh)
    measured = {}
    for name, stage in sizes.stages.items():
        program = Program.of(layout, stage)
        state = program.abstract_state
        with sharding.use_mesh(layout.mesh, layout.rules):
            lowered = program.step.lower(state, batch, np.float32(1.0), np.float32(1.0))
        used = lowered.compile().memory_analysis()
        measured[name] = {
            "weights": quantize.size(state.params),
            "adapters": quantize.size(state.adapters),
            "optimizer": quantize.size(state.optimizer),
            "besides": used.temp_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes,
            "peak": used.argument_size_in_bytes
            + used.temp_size_in_bytes
            + used.output_size_in_bytes
            - used.alias_size_in_bytes,
        }
    result = {"benchmark": "quantize", "unit": "bytes", "sizes": dataclasses.asdict(sizes)}
    result |= {"machine": machine(), "measured": measured}
    print(table(result))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def table(result: dict[str, Any]) -> str:
    """The figures as text, in MB; and how many times less each side needs than training all weights."""
    measured = result["measured"]
    columns = ("weights", "adapters", "optimizer", "besides", "peak")
    lines = ["memory of a compiled training step, MB; besides: gradients, activations, weights put together"]
    lines.append(f"{'what trains':32}" + "".join(f"{name:>11}" for name in columns) + f"{'less':>8}")
    for name, found in measured.items():
        cells = "".join(f"{found[column] / 1e6:11.1f}" for column in columns)
        lines.append(f"{name:32}{cells}{measured[FULL]['peak'] / found['peak']:7.1f}x")
    return "\n".join(lines)
