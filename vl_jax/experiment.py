"""An experiment: everything a run varies, as one value, and the run itself: train, evaluate, report."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import vl_jax
from vl_jax import allocator, generation, report, sharding
from vl_jax import config as config_lib
from vl_jax import params as params_lib
from vl_jax.batch import Batch
from vl_jax.checkpoint import Checkpointer
from vl_jax.data.audio import AudioConfig, SoundImage
from vl_jax.data.encode import DataConfig, ModelSpec, make_encoder
from vl_jax.data.images import TilingConfig
from vl_jax.data.llava import LlavaConfig
from vl_jax.data.meta import MetaConfig
from vl_jax.data.processor import Processor
from vl_jax.data.sample import IMAGE_PLACEHOLDER, FileImage, Sample, Turn
from vl_jax.data.sources import open_source
from vl_jax.evaluate.runner import EvaluationConfig, evaluate
from vl_jax.generation import GenerationConfig
from vl_jax.interop import pretrained
from vl_jax.layout import Layout, init_params, plan_layout, put_batch, rows_here
from vl_jax.model import VisionLanguage, VisionLanguageConfig, init_routing_state
from vl_jax.moe.routing import State, is_causal
from vl_jax.sharding import MeshConfig
from vl_jax.train import loop
from vl_jax.train.loop import LoopConfig
from vl_jax.train.stages import Stage, adapter_shapes, trainable_paths
from vl_jax.train.step import TrainState

logger = logging.getLogger(__name__)

# What is no property of a published model, but of how it is run and trained here: see ``resolve``.
MOE_SETTINGS = (
    "balance_weight",
    "balance_scope",
    "z_weight",
    "bias_rate",
    "capacity_factor",
    "capacity",
    "priority",
    "exchange",
    "kernel",
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What ``get_config`` of an experiment file builds."""

    name: str
    model: VisionLanguageConfig
    data: DataConfig
    stages: tuple[Stage, ...]
    init: str = ""  # folder of a published checkpoint to begin with (see ``resolve``); empty: random weights
    mesh: MeshConfig = MeshConfig()
    loop: LoopConfig = LoopConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0

    def __post_init__(self):
        if not self.init:
            check_data(self.data, self.model)
        if not self.stages:
            raise ValueError("stages is empty; an experiment needs at least one")
        names = [source.name for source in self.data.sources]
        for stage in self.stages:
            unknown = [name for name in stage.sources if name not in names]
            if unknown:
                raise ValueError(
                    f"stages.{stage.name}.sources names {unknown[0]!r}; data.sources has {', '.join(names)}"
                )


def check_data(data: DataConfig, model: VisionLanguageConfig) -> None:
    """Refuses tiles of another size than the encoder's images, and packing where samples would mix."""
    if model.encoder is not None and data.tiling.tile_size != model.encoder.image_size:
        raise ValueError(
            f"data.tiling.tile_size={data.tiling.tile_size} differs from "
            f"model.encoder.image_size={model.encoder.image_size}"
        )
    if data.packing is not None and model.num_sparse_layers:
        if not is_causal(model.moe):
            raise ValueError(
                f"data.packing with model.moe.scheme={model.moe.scheme!r}, priority={model.moe.priority!r}: "
                "tokens of a row are routed together, and the samples packed in it would act on one another"
            )
        if model.moe.balance_scope == "sequence":
            raise ValueError(
                "data.packing with model.moe.balance_scope='sequence': a packed row is no sequence; "
                "it must be 'batch' or 'step'"
            )


def resolve(experiment: Experiment) -> Experiment:
    """Fills in what ``init`` names: the model of the published checkpoint, its tokenizer and its tiling.

    Of the experiment's model, compute dtype, rematerialisation, ``scan_layers`` and ``MOE_SETTINGS`` stay; of
    its data, a tokenizer or a tiling other than the default. Resolving twice changes nothing.

    Raises:
      ValueError: the folder is no published checkpoint, or the tiling is not for its model.
    """
    if not experiment.init:
        return experiment
    folder, ours, data = Path(experiment.init), experiment.model, experiment.data
    if not folder.is_dir():
        raise ValueError(f"config.init={experiment.init}: no such folder")
    model = pretrained.read_published(folder).config
    settings = {name: getattr(ours.moe, name) for name in MOE_SETTINGS}
    model = dataclasses.replace(
        model,
        language=dataclasses.replace(
            model.language, remat=ours.language.remat, scan_layers=ours.language.scan_layers
        ),
        moe=dataclasses.replace(model.moe, **settings),
        dtype=ours.dtype,
    )
    if not data.tokenizer:
        data = dataclasses.replace(data, tokenizer=str(folder))
    if data.tiling == TilingConfig() and (folder / "processor_config.json").is_file():
        processor = Processor.load(folder)
        data = dataclasses.replace(data, tiling=processor.config.tiling(processor.views))
    check_data(data, model)
    return dataclasses.replace(experiment, model=model, data=data)


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
        adapter_shapes(stage, layout.params)
    for path, placement in layout.placements.items():
        if placement.whole:
            logger.warning("%s: %s does not divide, kept whole on the mesh", path, ", ".join(placement.whole))
    moe = experiment.model.moe
    if experiment.model.num_sparse_layers and moe.top_k == 1 and moe.normalize_gates:
        logger.warning(
            "model.moe.top_k=1 with normalize_gates=True: the only gate of a token is always 1, so the "
            "router learns nothing from the task; set normalize_gates=False"
        )
    return layout


def run(experiment: Experiment, workdir: Path) -> dict[str, Any]:
    """Trains (or resumes), evaluates and writes the report. Returns the evaluation results by task.

    Raises:
      loop.Stopped: the run was asked to stop and saved its state.
      ValueError: the configuration does not fit the machine, the data or an earlier run of this folder.
    """
    allocator.keep_freed_memory()
    start, experiment = time.time(), resolve(experiment)
    for source in (*experiment.data.sources, *experiment.data.evaluation):
        open_source(source, root=experiment.data.root)
    layout = plan(experiment)
    _claim(experiment, workdir)
    state = loop.train(
        layout,
        experiment.stages,
        lambda stage: open_stream(experiment, stage, rows_here(layout, stage.batch_size)),
        begin=lambda: first_weights(experiment, layout),
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


def first_weights(experiment: Experiment, layout: Layout) -> tuple[Any, State]:
    """Parameters and routing state that a run begins with: those of ``init``, or fresh ones."""
    if experiment.init:
        return pretrained.load_params(Path(experiment.init), layout)
    example = example_batch(experiment, sharding.batch_axes(layout.mesh))
    return init_params(layout, example, experiment.seed), init_routing_state(layout.model.config)


def evaluate_all(experiment: Experiment, layout: Layout, state: TrainState, workdir: Path) -> dict[str, Any]:
    """Evaluates every held-out source of the experiment that has no result of this step yet."""
    step = sum(stage.steps for stage in experiment.stages)
    results = {}
    for source in experiment.data.evaluation:
        done = workdir / "eval" / source.name / f"{step}.json"
        if done.exists():
            results[source.name] = json.loads(done.read_text(encoding="utf-8"))
        else:
            results[source.name] = evaluate_task(experiment, layout, state, workdir, source.name, step)
    return results


def evaluate_task(
    experiment: Experiment, layout: Layout, state: TrainState, workdir: Path, task: str, step: int
) -> dict[str, Any]:
    """Evaluates one held-out source; writes ``eval/<task>/<step>.json`` and returns its content."""
    return evaluate(
        layout,
        state.params,
        state.routing,
        data=experiment.data,
        spec=model_spec(experiment),
        config=experiment.evaluation,
        task=task,
        step=step,
        workdir=workdir,
    )


def evaluate_run(workdir: Path, tasks: Sequence[str], overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a run anew, on the named tasks or, with none named, on all.

    Args:
      overrides: changes to the run's ``evaluation`` and ``data``, by dotted path.

    Raises:
      ValueError: the folder holds no run, it has no such task, or an override concerns what was trained.
    """
    wrong = next((path for path, _ in overrides if path.split(".")[0] not in ("evaluation", "data")), None)
    if wrong is not None:
        raise ValueError(
            f"--config.{wrong}: of a finished run only config.evaluation and config.data may change"
        )
    experiment, layout, state, step = restore(workdir, overrides)
    names = _tasks(experiment, tasks)
    results = {name: evaluate_task(experiment, layout, state, workdir, name, step) for name in names}
    if jax.process_index() == 0:
        report.write_report(workdir)
    return results


def evaluate_published(experiment: Experiment, tasks: Sequence[str], workdir: Path) -> dict[str, Any]:
    """Evaluates the published checkpoint ``experiment.init`` as it is, on tasks of the experiment."""
    names, experiment = _tasks(experiment, tasks), resolve(experiment)
    layout = plan(experiment)
    params, routing = first_weights(experiment, layout)
    state = TrainState(np.zeros((), np.int32), params, None, routing)
    return {name: evaluate_task(experiment, layout, state, workdir, name, 0) for name in names}


def _tasks(experiment: Experiment, names: Sequence[str]) -> Sequence[str]:
    known = [source.name for source in experiment.data.evaluation]
    for name in names or known[:1] or [""]:
        if name not in known:
            raise ValueError(f"--task={name}: config.data.evaluation has {', '.join(known) or 'no source'}")
    return names or known


def restore(
    workdir: Path, overrides: Sequence[tuple[str, str]] = (), *, before: int | None = None
) -> tuple[Experiment, Layout, TrainState, int]:
    """The experiment of a run, its newest state on the devices here, adapters merged, and the state's step.

    Args:
      before: the newest state of an earlier step than this one.

    Raises:
      ValueError: the folder holds no run, or no sound checkpoint.
    """
    path = workdir / "config.json"
    if not path.is_file():
        raise ValueError(f"--workdir={workdir} holds no run: there is no config.json")
    experiment = config_lib.from_json(path.read_text(encoding="utf-8"))
    if overrides:
        experiment = config_lib.replace(experiment, overrides)
    layout = plan(experiment)
    checkpointer = Checkpointer(workdir / "checkpoints")
    try:
        restored = loop.restore(checkpointer, layout, experiment.stages, before=before)
    finally:
        checkpointer.close()
    if restored is None:
        when = "" if before is None else f" of a step before {before}"
        raise ValueError(f"--workdir={workdir} holds no checkpoint{when} yet")
    state, position = restored
    state = loop.merge_adapters(layout, loop.stage_at(experiment.stages, position), state)
    return experiment, layout, state, position.global_step


def export(workdir: Path, target: Path) -> None:
    """Writes the model of a fine-tuned run, adapters merged, as the published checkpoint it began with.

    Raises:
      ValueError: the run did not begin with a published checkpoint, or the target exists.
    """
    experiment, _, state, _ = restore(workdir)
    if not experiment.init:
        raise ValueError(
            f"{workdir}: the run did not begin with a published checkpoint (config.init is empty)"
        )
    published = pretrained.read_published(experiment.init).as_run_by(experiment.model)
    pretrained.write_published(target, state.params, state.routing, published)


def answer(
    workdir: Path, *, prompt: str, image: Path | None, audio: Path | None = None, max_new_tokens: int
) -> str:
    """What the model of a run says to one prompt, about an image, a sound, both or neither."""
    experiment, layout, state, _ = restore(workdir)
    encoder = make_encoder(experiment.data, model_spec(experiment))
    pictures = [FileImage(image, where="--image")] if image else []
    pictures += [SoundImage(audio, "--audio", _hearing(experiment))] if audio else []
    question = f"{IMAGE_PLACEHOLDER}\n" * len(pictures) + prompt
    sample = Sample(id=str(image or audio or "prompt"), turns=(Turn(question, ""),), images=tuple(pictures))
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


def _hearing(experiment: Experiment) -> AudioConfig:
    """How the sounds of the experiment's sources become pictures."""
    for source in experiment.data.sources:
        if isinstance(source, LlavaConfig | MetaConfig):
            return source.audio
    raise ValueError("--audio: no source of the run says how a sound becomes a picture")


def open_stream(experiment: Experiment, stage: Stage, rows: Sequence[int] | None = None) -> loop.Stream:
    """The training batches of a stage, in an order that follows from the seed and the stage's name.

    Args:
      rows: of the global batch, those that this process needs; None: all of them.
    """
    from vl_jax.data.packed import PackedIterator
    from vl_jax.data.pipeline import TrainIterator

    packed = experiment.data.packing is not None
    iterator = functools.partial(PackedIterator, rows=rows) if packed else TrainIterator
    return iterator(
        experiment.data,
        model_spec(experiment),
        batch_size=stage.batch_size,
        sources=mixture(experiment, stage),
        targets=stage.targets,
        seed=_stage_seed(experiment, stage),
    )


def mixture(experiment: Experiment, stage: Stage) -> dict[str, float]:
    """The sources of a stage and their weights."""
    names = stage.sources or tuple(source.name for source in experiment.data.sources)
    return dict(zip(names, stage.weights or (1.0,) * len(names), strict=True))


def _stage_seed(experiment: Experiment, stage: Stage) -> int:
    entropy = [experiment.seed, experiment.data.seed, *stage.name.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def _claim(experiment: Experiment, workdir: Path) -> None:
    """Writes the resolved config; refuses a folder that holds a run of another one.

    Of a run begun by an earlier version, fields that did not exist yet have their defaults.
    """
    path, text = workdir / "config.json", config_lib.to_json(experiment)
    held = text
    if path.exists():
        held = config_lib.to_json(config_lib.from_json(path.read_text(encoding="utf-8")))
    if held != text:
        before, now = (_flat(json.loads(t)) for t in (held, text))
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
