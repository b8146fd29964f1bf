"""An experiment: everything a run varies, as one value, and what follows from it without training."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np

from vl_jax import config, schema, sharding
from vl_jax.batch import Batch
from vl_jax.checkpoint import CHECKPOINTS
from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.encode import make_encoder
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.interop import parts, pretrained
from vl_jax.interop.folder import CONFIG
from vl_jax.interop.run_as import run_as
from vl_jax.joint import JointConfig
from vl_jax.language.text_to_text import TextToTextConfig
from vl_jax.layout import Layout, ModelConfig, Variables, init_variables, plan_layout
from vl_jax.model import VisionLanguageConfig
from vl_jax.moe.specialise.growing import GrowthConfig
from vl_jax.moe.specialise.upcycling import UpcyclingConfig
from vl_jax.runtime import errors
from vl_jax.runtime.storage import buckets
from vl_jax.schema import ConfigError, Open
from vl_jax.sharding import MeshConfig
from vl_jax.train import initial, loop, saved
from vl_jax.train.loop import LoopConfig
from vl_jax.train.lora import LoraConfig
from vl_jax.train.specialise.guide import GuideConfig
from vl_jax.train.stages import Stage, expert_masks

logger = logging.getLogger(__name__)

RUN_CONFIG = "config.json"  # in the folder of a run, what it was launched with, resolved

MODEL_NEEDS = ("stacks", "spec", "check_data", "build", "smallest_batch")  # what a model's config must have


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What ``get_config`` of an experiment file builds."""

    name: str
    model: Annotated[
        VisionLanguageConfig | JointConfig | TextToTextConfig | ModelConfig, Open("model", MODEL_NEEDS)
    ]
    data: DataConfig
    stages: tuple[Stage, ...]
    # Folder to begin with: a published checkpoint (see ``resolve``), or a run (see ``train.initial``), its
    # checkpoints or one of them; empty: random weights.
    init: str = ""
    # Parts that begin with published encoders all the same: path of the part and folder (see
    # ``interop.parts``), as (("image/trunk", "resnet-18"),).
    init_parts: tuple[tuple[str, str], ...] = ()
    init_experts: GrowthConfig | None = (
        None  # how experts begin that the run of ``init`` lacks; None: as all else
    )
    # The checkpoint of ``init`` is dense where the model has experts: they begin as copies of its blocks, so
    # that the first loss is its loss. None: they begin as all else.
    init_dense: UpcyclingConfig | None = None
    guide: GuideConfig | None = None  # a run whose routes are taken, or whose routers teach; None: neither
    mesh: MeshConfig = MeshConfig()
    loop: LoopConfig = LoopConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: int = 0

    def __post_init__(self):
        if not self.init:
            self.model.check_data(self.data)
        if self.init_experts is not None and not self.init:
            raise ValueError("init_experts needs init, the run whose experts there are to be more of")
        if self.init_dense is not None and (not self.init or self.init_experts is not None):
            what = "excludes init_experts" if self.init else "needs init, the run whose blocks are copied"
            raise ValueError(f"init_dense {what}")
        if not self.stages:
            raise ValueError("stages is empty; an experiment needs at least one")
        if self.evaluation.average and not self.stages[-1].optimizer.average:
            raise ValueError(
                f"evaluation.average=True: stages.{self.stages[-1].name}.optimizer.average is 0, so there is "
                "no average of its parameters; set it to a decay such as 0.999"
            )
        unknown = set(self.guide.stages if self.guide else ()) - {stage.name for stage in self.stages}
        if unknown:
            raise ValueError(f"guide.stages names {min(unknown)!r}, which is no stage")
        names = [source.name for source in self.data.sources]
        for stage in self.stages:
            unknown = [name for name in stage.sources if name not in names]
            if unknown:
                raise ValueError(
                    f"stages.{stage.name}.sources names {unknown[0]!r}; data.sources has {', '.join(names)}"
                )


def load(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> Experiment:
    """The experiment of a file with overrides applied, resolved.

    Args:
      spec: experiment file, as for ``config.load``.

    Raises:
      ConfigError: the file is wrong, or gives something else than an experiment.
    """
    found = config.load(spec, overrides)
    if not isinstance(found, Experiment):
        raise ConfigError(f"--config={spec}: get_config() gave no Experiment")
    return resolve(found)


def resolve(experiment: Experiment) -> Experiment:
    """Fills in what ``init`` names: the model of the published checkpoint, its tokenizer and its tiling.

    Of the experiment's model, what ``run_as`` names stays; of its data, a tokenizer or a tiling
    other than the default. With a run to begin with the model is the experiment's own. Resolving twice
    changes nothing.

    Raises:
      ValueError: the folder is neither a published checkpoint nor a run, or the model or the tiling is not
        for it.
    """
    if not experiment.init:
        parts.find(experiment.model, experiment.init_parts)
        return experiment
    folder, ours, data = buckets.here(experiment.init), experiment.model, experiment.data
    if not folder.is_dir():
        raise ValueError(f"config.init={experiment.init}: no such folder")
    if initial.find(folder) is not None:
        ours.check_data(data)
        parts.find(ours, experiment.init_parts)
        return experiment
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"config.init={experiment.init}: neither a published checkpoint (no {CONFIG}) nor a run (no "
            f"{CHECKPOINTS}/)"
        )
    published = pretrained.read_published(folder)
    model = run_as(published.config, ours)
    if not data.tokenizer:
        data = dataclasses.replace(data, tokenizer=buckets.address(experiment.init) or str(folder))
    way = data.tiling.orientation
    if data.tiling == TilingConfig(orientation=way) and (tiling := published.tiling) is not None:
        data = dataclasses.replace(data, tiling=dataclasses.replace(tiling, orientation=way))
    model.check_data(data)
    parts.find(model, experiment.init_parts)
    return dataclasses.replace(experiment, model=model, data=data)


def model_spec(experiment: Experiment) -> ModelSpec:
    """What the data side must know of the model."""
    return experiment.model.spec()


def example_batch(experiment: Experiment, rows: int) -> Batch:
    """An empty batch of the experiment's static shapes, for looking at only: memory holds one row of it."""
    one = make_encoder(experiment.data, model_spec(experiment)).collate([[]])
    return jax.tree.map(lambda x: np.broadcast_to(x, (rows, *x.shape[1:])), one)


def plan(experiment: Experiment, devices: Sequence[Any] | None = None) -> Layout:
    """Builds the mesh and decides where every parameter lives, without allocating any.

    Args:
      devices: of the mesh, which need not be here; None: all that are.

    Raises:
      ValueError: the mesh does not divide devices or batches, a stage's pattern matches no parameter, or the
        model cannot predict its targets.
    """
    allowed = model_spec(experiment).targets
    for stage in experiment.stages:
        if stage.targets not in allowed:
            raise ValueError(
                f"config.stages.{stage.name}.targets={stage.targets!r}: a row of this model can predict "
                f"{' or '.join(map(repr, allowed))}"
            )
    mesh = sharding.make_mesh(experiment.mesh, devices)
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
    try:
        layout = plan_layout(experiment.model, example_batch(experiment, rows), mesh)
    except Exception as error:
        if isinstance(error, ValueError) or errors.place_of(error):  # it says enough itself
            raise
        raise ValueError(
            f"config.model: no model can be built of these sizes: {errors.described(error)}"
        ) from error
    for stage in experiment.stages:
        expert_masks(stage, layout.params, layout.roles, experiment.model.stacks)
    for path, placement in layout.placements.items():
        if placement.whole:
            logger.warning("%s: %s does not divide, kept whole on the mesh", path, ", ".join(placement.whole))
    for name, stack in experiment.model.stacks.items():
        if stack.moe.top_k == 1 and stack.moe.gates.normalize:
            logger.warning(
                "%s: moe.top_k=1 with gates.normalize=True: the only gate of a token is always 1, so the "
                "router learns nothing from the task; set gates.normalize=False",
                name,
            )
    return layout


def first_weights(experiment: Experiment, layout: Layout) -> Variables:
    """What a run begins with: the variables of ``init``, or fresh ones, with the parts of ``init_parts``.

    Raises:
      ValueError: the checkpoint of ``init`` or of a part is damaged, or not for the model.
    """
    variables = _whole_weights(experiment, layout)
    found = parts.find(experiment.model, experiment.init_parts)
    return parts.load(variables, layout, found) if found else variables


def _whole_weights(experiment: Experiment, layout: Layout) -> Variables:
    """Parameters and routing state of ``init``, or fresh ones."""
    folder = buckets.here(experiment.init)
    origin = initial.find(folder) if experiment.init else None
    if experiment.init and origin is None:  # no model that is published has collections
        if experiment.init_experts is not None:
            raise ValueError(
                f"config.init_experts: {folder} is a published checkpoint; experts are added to a run's"
            )
        if experiment.init_dense is not None:
            raise ValueError(
                f"config.init_dense: {folder} is a published checkpoint; `convert` it and begin with that"
            )
        return Variables(*pretrained.load_params(folder, layout))
    example = example_batch(experiment, sharding.batch_axes(layout.mesh))
    if origin is None:
        return init_variables(layout, example, experiment.seed)
    run = origin.checkpoints.parent
    is_run = origin.checkpoints.name == CHECKPOINTS and (run / RUN_CONFIG).is_file()
    before = read_run(run) if is_run else None
    if before is not None and before.data.tokenizer != experiment.data.tokenizer:
        logger.warning(
            "init: config.data.tokenizer is %r in %s and %r here: the same number may be another token",
            before.data.tokenizer,
            run,
            experiment.data.tokenizer,
        )

    def lora_of(record: Mapping[str, Any]) -> LoraConfig | None:
        if before is None:
            raise ValueError(
                f"config.init={folder}: its adapters are not merged, and there is no {RUN_CONFIG} beside to "
                "say how much they count; give the folder of the run"
            )
        return saved.stage_at(before.stages, saved.Position(**record["position"])).lora

    begin = {"growth": experiment.init_experts, "upcycling": experiment.init_dense}
    return initial.load(origin, layout, example, lora_of=lora_of, seed=experiment.seed, **begin)


def read_run(workdir: Path) -> Experiment:
    """The experiment of a run, from its ``config.json``.

    Raises:
      ValueError: there is no such file, or it is damaged; names it and says what to do.
    """
    path = workdir / RUN_CONFIG
    if not path.is_file():
        raise ValueError(f"--workdir={workdir} holds no run: there is no {RUN_CONFIG}")
    try:
        return schema.from_json(path.read_text(encoding="utf-8"), Experiment)
    except schema.ConfigError as error:
        raise ValueError(f"{path}: {error}") from None
    except ValueError as error:
        what = "empty" if not path.stat().st_size else f"cut or damaged ({error})"
        raise ValueError(
            f"{path}: {what}; delete it and launch `train` with the options the run began with: it goes on "
            "from its checkpoints and writes the file anew"
        ) from None


def open_stream(
    experiment: Experiment, stage: Stage, rows: Sequence[int] | None = None
) -> loop.TrainingStream:
    """The training batches of a stage, in an order that follows from the seed and the stage's name.

    Args:
      rows: of the global batch, those that this process needs; None: all of them.
    """
    from vl_jax.data.stream.packed import PackedIterator
    from vl_jax.data.stream.pipeline import TrainIterator

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
