"""An experiment: everything a run varies, as one value, and the run itself: train, evaluate, report."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import vl_jax
from vl_jax import config as config_lib
from vl_jax import generation, report, sharding
from vl_jax import params as params_lib
from vl_jax.batch import Batch
from vl_jax.checkpoint import Checkpointer
from vl_jax.data.encode import DataConfig, ModelSpec, make_encoder
from vl_jax.data.sample import IMAGE_PLACEHOLDER, FileImage, Sample, Turn
from vl_jax.data.sources import open_source
from vl_jax.evaluate.runner import EvaluationConfig, evaluate
from vl_jax.generation import GenerationConfig
from vl_jax.layout import Layout, plan_layout, put_batch
from vl_jax.model import VisionLanguage, VisionLanguageConfig
from vl_jax.sharding import MeshConfig
from vl_jax.train import loop
from vl_jax.train.loop import LoopConfig
from vl_jax.train.stages import Stage, trainable_paths
from vl_jax.train.step import TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What ``get_config`` of an experiment file builds."""

    name: str
    model: VisionLanguageConfig
    data: DataConfig
    stages: tuple[Stage, ...]
    mesh: MeshConfig = MeshConfig()
    loop: LoopConfig = LoopConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0

    def __post_init__(self):
        tile, image = self.data.tiling.tile_size, self.model.encoder.image_size
        if tile != image:
            raise ValueError(f"data.tiling.tile_size={tile} differs from model.encoder.image_size={image}")
        if not self.stages:
            raise ValueError("stages is empty; an experiment needs at least one")
        names = [source.name for source in self.data.sources]
        for stage in self.stages:
            unknown = [name for name in stage.sources if name not in names]
            if unknown:
                raise ValueError(
                    f"stages.{stage.name}.sources names {unknown[0]!r}; data.sources has {', '.join(names)}"
                )


def model_spec(experiment: Experiment) -> ModelSpec:
    """What the data side must know of the model."""
    model = experiment.model
    return ModelSpec(
        tile_tokens_side=model.tile_tokens_side,
        fusion=model.fusion.kind,
        vocab_size=model.language.vocab_size,
    )


def example_batch(experiment: Experiment, rows: int) -> Batch:
    """An empty batch of the experiment's static shapes."""
    encoder = make_encoder(experiment.data, model_spec(experiment))
    return encoder.collate([[] for _ in range(rows)])


def plan(experiment: Experiment) -> Layout:
    """Builds the mesh and decides where every parameter lives, without allocating any.

    Raises:
      ValueError: the mesh does not divide devices or batches, or a stage's pattern matches no parameter.
    """
    mesh = sharding.make_mesh(experiment.mesh)
    rows = sharding.batch_axes(mesh)
    sizes = {
        f"stages.{s.name}.batch_size": (s.batch_size, s.batch_size // s.accumulation)
        for s in experiment.stages
    }
    sizes["evaluation.batch_size"] = (experiment.evaluation.batch_size, experiment.evaluation.batch_size)
    for name, (whole, part) in sizes.items():
        if part % rows:
            raise ValueError(
                f"config.{name}={whole}: {part} rows do not divide by the {rows} batch shards of the mesh "
                f"({experiment.mesh.describe()})"
            )
    layout = plan_layout(VisionLanguage(experiment.model), example_batch(experiment, rows), mesh)
    for stage in experiment.stages:
        trainable_paths(stage, layout.params)
    for path, placement in layout.placements.items():
        if placement.whole:
            logger.warning("%s: %s does not divide, kept whole on the mesh", path, ", ".join(placement.whole))
    return layout


def run(experiment: Experiment, workdir: Path) -> dict[str, Any]:
    """Trains (or resumes), evaluates and writes the report. Returns the evaluation results by task.

    Raises:
      loop.Stopped: the run was asked to stop and saved its state.
      ValueError: the configuration does not fit the machine, the data or an earlier run of this folder.
    """
    start = time.time()
    for source in (*experiment.data.sources, *experiment.data.evaluation):
        open_source(source, root=experiment.data.root)
    layout = plan(experiment)
    _claim(experiment, workdir)
    example = example_batch(experiment, sharding.batch_axes(layout.mesh))
    state = loop.train(
        layout,
        experiment.stages,
        lambda stage: open_stream(experiment, stage),
        example=example,
        workdir=workdir,
        config=experiment.loop,
        seed=experiment.seed,
    )
    results = evaluate_all(experiment, layout, state, workdir)
    if jax.process_index() == 0:
        facts = {"wall_time_s": round(time.time() - start, 1), **_facts(layout)}
        (workdir / "run.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        report.write_report(workdir)
    return results


def evaluate_all(experiment: Experiment, layout: Layout, state: TrainState, workdir: Path) -> dict[str, Any]:
    """Evaluates every held-out source of the experiment that has no result of this step yet."""
    step = sum(stage.steps for stage in experiment.stages)
    results = {}
    for source in experiment.data.evaluation:
        done = workdir / "eval" / source.name / f"{step}.json"
        if done.exists():
            results[source.name] = json.loads(done.read_text(encoding="utf-8"))
            continue
        results[source.name] = evaluate(
            layout,
            state.params,
            state.routing,
            data=experiment.data,
            spec=model_spec(experiment),
            config=experiment.evaluation,
            task=source.name,
            step=step,
            workdir=workdir,
        )
    return results


def restore(workdir: Path) -> tuple[Experiment, Layout, TrainState]:
    """The experiment of a run, and its newest state on the devices here.

    Raises:
      ValueError: the folder holds no run, or no sound checkpoint.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"--workdir={workdir} holds no run: there is no config.json")
    experiment = config_lib.from_json(path.read_text(encoding="utf-8"))
    layout = plan(experiment)
    checkpointer = Checkpointer(workdir / "checkpoints")
    try:
        restored = loop.restore(checkpointer, layout, experiment.stages)
    finally:
        checkpointer.close()
    if restored is None:
        raise ValueError(f"--workdir={workdir} holds no checkpoint yet")
    return experiment, layout, restored[0]


def answer(workdir: Path, *, prompt: str, image: Path | None, max_new_tokens: int) -> str:
    """What the model of a run says to one prompt about one image (or none)."""
    experiment, layout, state = restore(workdir)
    encoder = make_encoder(experiment.data, model_spec(experiment))
    question = f"{IMAGE_PLACEHOLDER}\n{prompt}" if image else prompt
    pictures = (FileImage(image, where="--image"),) if image else ()
    sample = Sample(id=str(image or "prompt"), turns=(Turn(question, ""),), images=pictures)
    rows = [[encoder.prompt(sample)]] * sharding.batch_axes(layout.mesh)
    stop = (encoder.tokenizer.eos,)
    with sharding.use_mesh(layout.mesh, layout.rules):
        tokens = generation.generate(
            state.params,
            state.routing,
            put_batch(encoder.collate(rows, pad_left=True), layout),
            model=layout.model,
            config=GenerationConfig(max_new_tokens=max_new_tokens),
            stop=stop,
        )
    return encoder.tokenizer.decode(generation.answer_ids(tokens, stop=stop)[0])


def open_stream(experiment: Experiment, stage: Stage) -> loop.Stream:
    """The training batches of a stage, in an order that follows from the seed and the stage's name."""
    from vl_jax.data.pipeline import TrainIterator

    names = stage.sources or tuple(source.name for source in experiment.data.sources)
    weights = stage.weights or (1.0,) * len(names)
    return TrainIterator(
        experiment.data,
        model_spec(experiment),
        batch_size=stage.batch_size,
        sources=dict(zip(names, weights, strict=True)),
        targets=stage.targets,
        seed=_stage_seed(experiment, stage),
    )


def _stage_seed(experiment: Experiment, stage: Stage) -> int:
    entropy = [experiment.seed, experiment.data.seed, *stage.name.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _claim(experiment: Experiment, workdir: Path) -> None:
    """Writes the resolved config; refuses a folder that holds a run of another one."""
    path, text = workdir / "config.json", config_lib.to_json(experiment)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        before, now = (_flat(json.loads(t)) for t in (path.read_text(encoding="utf-8"), text))
        changed = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        raise ValueError(
            f"--workdir={workdir} holds a run with another configuration "
            f"(differs at {', '.join(changed[:3])}); resume it with the same options or choose another folder"
        )
    if jax.process_index() != 0:
        return
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _flat(tree: Any, prefix: str = "config") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}.{key}").items()}


def _facts(layout: Layout) -> dict[str, Any]:
    """What the report says about the machine and the model."""
    device = jax.devices()[0]
    parameters = sum(math.prod(leaf.shape) for leaf in params_lib.flatten(layout.params).values())
    return {
        "parameters": parameters,
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "host": f"{os.cpu_count()} cores, {platform.machine()}",
        "vl_jax": vl_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
    }
