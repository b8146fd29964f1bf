"""Training, evaluating and opening runs from Python: in a script, a notebook or any thread.

    import vl_jax
    experiment = vl_jax.load_experiment("quickstart", {"stages.sft.steps": 400})
    run = vl_jax.train(experiment, "runs/mine")
    print(run.results["heldout"]["scores"])
    print(vl_jax.predict(run, image="scene.png", text="what colour is the circle?"))

Whatever a user can put right is raised as ``vl_jax.UserError``, with the line that the command line prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import jax

from vl_jax import config, runs
from vl_jax.api import sitting
from vl_jax.api.part import heads_for, load_heads
from vl_jax.api.run import Run
from vl_jax.experiment import Experiment, read_run
from vl_jax.joint import JointConfig
from vl_jax.runtime import errors, start
from vl_jax.runtime.storage import buckets, mirror


def load_experiment(file: str | PathLike[str], overrides: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment of a file, or one that comes with the package, with some values changed.

    Args:
      file: ``my_experiment.py``, ``my_experiment.py:argument``, or a name such as ``quickstart``.
      overrides: values by dotted path, as on the command line: ``{"model.moe.top_k": 1}``.

    Raises:
      UserError: the file is wrong, or a value breaks a rule.
    """
    with errors.told():
        return _checked(config.load(fspath(file), _pairs(overrides)), fspath(file))


def train(
    experiment: Experiment | str | PathLike[str],
    workdir: str | PathLike[str],
    overrides: Mapping[str, Any] | None = None,
) -> Run:
    """Trains an experiment in a folder, evaluates it and writes ``report.html``; resumes a run begun there.

    An interrupt (Ctrl-C, or the stop button of a notebook) saves the state first. In a thread that is not the
    main one there are no signals; such a run ends with its process, and the next call resumes it.

    Args:
      experiment: the experiment itself, or what ``load_experiment`` takes.
      workdir: the folder, which may be in a bucket: ``gs://...`` or ``s3://...``.
      overrides: as for ``load_experiment``.

    Raises:
      UserError: the configuration does not fit the machine, the data, or an earlier run of the folder.
    """
    start.set_up(joins=True)
    if isinstance(experiment, Experiment):
        with errors.told():
            chosen = config.replace(experiment, _pairs(overrides)) if overrides else experiment
    else:
        chosen = load_experiment(experiment, overrides)
    with errors.told(), mirror.folder_of(workdir, lead=jax.process_index() == 0) as folder:
        runs.run(chosen, folder)
    return load_run(workdir)


def load_run(workdir: str | PathLike[str], *, heads: str | Sequence[str] = (), task: str = "") -> Run:
    """Opens the newest sound checkpoint of a run, finished or not.

    Args:
      heads: of a joint model, these alone; only they and the towers that they stand on are read. Empty: all.
      task: of a joint model, in place of ``heads``: the head that does this task.

    Raises:
      UserError: the folder holds no run, no checkpoint that can be used, or no such head or task.
    """
    start.set_up()
    names = (heads,) if isinstance(heads, str) else tuple(heads)
    with errors.told():
        folder = buckets.here(str(workdir))
    with errors.told():
        if task:
            names = heads_for(read_run(folder).model, folder, task, names)
        if names and isinstance(read_run(folder).model, JointConfig):
            return load_heads(folder, names)
        experiment, layout, state, step = runs.restore(folder)
    return Run(folder, experiment, layout, state, step)


def evaluate(
    run: Run | str | PathLike[str],
    tasks: str | Sequence[str] = (),
    overrides: Mapping[str, Any] | None = None,
    *,
    data: str | PathLike[str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluates the newest checkpoint of a run; gives what ``eval/<task>/<step>.json`` then holds, by task.

    Args:
      run: an open run, or its folder.
      tasks: names in the experiment's ``data.evaluation``; none: all of them. With ``data``, the one exam.
      data: folder with the files of a published exam.
      overrides: changes to the run's ``evaluation`` and ``data``: ``{"evaluation.limit": 100}``.

    Raises:
      UserError: there is no such run or task, or an override concerns what was trained.
    """
    start.set_up(joins=True)
    folder = run.workdir if isinstance(run, Run) else Path(run)
    names = (tasks,) if isinstance(tasks, str) else tuple(tasks)
    with errors.told():
        if data is None:
            return runs.evaluate_run(folder, names, _pairs(overrides))
        if len(names) != 1:
            raise errors.UserError(f"tasks={names}: with data it is the name of one exam, such as 'docvqa'")
        return sitting.take_by_run(sitting.Sitting(names[0], Path(data)), folder, _pairs(overrides))


def _pairs(overrides: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Overrides as the command line has them."""
    return [(path, str(value)) for path, value in (overrides or {}).items()]


def _checked(found: Any, file: str) -> Experiment:
    if not isinstance(found, Experiment):
        raise errors.UserError(f"{file}: get_config() gave {type(found).__name__}, not an Experiment")
    return found
