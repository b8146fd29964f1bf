"""Runs in lockstep: those that differ only in their seed take each of their steps as one program.

    courses of single runs  --turns-->  one step, mapped over runs  --states and figures-->  courses

Every run reads, logs, guards and saves as it does alone. The compiler works once for all of them, and one
operation on many small arrays costs less than many operations. The figures of a step are fetched at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from vl_jax import sharding
from vl_jax.batch import Batch, without
from vl_jax.layout import Layout
from vl_jax.train.loop import Course, StepDone, StepDue, Stopped
from vl_jax.train.program import Program
from vl_jax.train.step import Metrics, TrainState

Stop = Callable[[], int | None]


def drive(
    make: Sequence[Callable[[Stop], Course]], *, layout: Layout, seeds: Sequence[int], stop: Stop
) -> list[TrainState | Exception]:
    """Takes the steps of several courses; returns what each returns, or why it failed.

    A course that fails leaves the others as they are. One that is done waits for the others.

    Args:
      make: gives the course of each run, from what asks it to stop.
      seeds: of the noise of routing of each.
      stop: the number of the signal that asks all of them to stop, if any.

    Raises:
      Stopped: they were asked to stop, all after the same step, and have saved.
    """
    asked: list[int | None] = [None]  # looked at once for all runs, so that they stop after the same step
    taking, ends = _Taking(layout, seeds), dict[int, TrainState | Exception]()
    with contextlib.ExitStack() as open_courses:
        courses = [open_courses.enter_context(contextlib.closing(one(lambda: asked[0]))) for one in make]
        answers: dict[int, Any] = dict.fromkeys(range(len(courses)))
        while answers:
            turns: dict[int, StepDue] = {}
            for number, answer in answers.items():
                try:
                    turns[number] = courses[number].send(answer)
                except StopIteration as end:
                    ends[number] = end.value
                except Exception as error:
                    ends[number] = error
            answers = dict(taking.take(turns))
            asked[0] = stop()
    stopped = next((end for end in ends.values() if isinstance(end, Stopped)), None)
    if stopped is not None:
        raise stopped
    return [ends[number] for number in range(len(courses))]


@dataclasses.dataclass(frozen=True, eq=False)
class _Cohort:
    """Runs at the same stage, and their states."""

    runs: tuple[int, ...]
    program: Program
    states: TrainState  # [S ...]


class _Taking:
    """Takes the turns of runs; those of one program together."""

    def __init__(self, layout: Layout, seeds: Sequence[int]):
        self._layout, self._seeds = layout, np.asarray(seeds, np.int32)
        self._compiled: dict[Callable, Callable] = {}  # by the step of one run
        self._groups: list[_Cohort] = []
        self._handed: dict[int, Callable[[], TrainState]] = {}
        self._last: dict[int, StepDue] = {}  # a run that has ended keeps its place, unread

    def take(self, turns: Mapping[int, StepDue]) -> dict[int, StepDone]:
        """What comes of some turns, by number of the run."""
        self._last |= turns
        by_program: dict[int, list[int]] = {}
        for number, turn in turns.items():
            by_program.setdefault(id(turn.program), []).append(number)
        groups = [self._group(numbers, turns) for numbers in by_program.values()]
        self._groups, taken = [], dict[int, StepDone]()
        for group in groups:
            after, metrics = self._step(group)
            self._groups.append(after)
            for place, number in enumerate(group.runs):
                self._handed[number] = functools.partial(_one_of, after.states, place)
                if number in turns:
                    own = {name: value[place] for name, value in metrics.items()}
                    taken[number] = StepDone(self._handed[number], own)
        return taken

    def _group(self, numbers: Sequence[int], turns: Mapping[int, StepDue]) -> _Cohort:
        """Runs of one program, with the states that they step from."""
        program = turns[numbers[0]].program
        for group in self._groups:
            is_theirs = group.program is program and set(numbers) <= set(group.runs)
            if is_theirs and all(turns[number].state is self._handed[number] for number in numbers):
                return group
        return _Cohort(tuple(numbers), program, _stacked([turns[number].state() for number in numbers]))

    def _step(self, group: _Cohort) -> tuple[_Cohort, dict[str, np.ndarray]]:
        """A step of all runs of a group; its figures, on the host, have runs first."""
        layout, turns = self._layout, [self._last[number] for number in group.runs]
        rows = sharding.batch_sharding(layout.mesh, layout.rules)
        target = NamedSharding(layout.mesh, P(None, *rows.spec))
        absent = frozenset.intersection(*(turn.absent for turn in turns))
        batches = [without(turn.batch, absent) for turn in turns]
        batch = jax.tree.map(lambda *of: jax.device_put(np.stack(of), target), *batches)
        rates, limits = (np.stack([getattr(t, name) for t in turns]) for name in ("learning_rate", "limit"))
        seeds = self._seeds[list(group.runs)]
        with sharding.use_mesh(layout.mesh, layout.rules):
            step = self._mapped(group.program)
            states, metrics = step(group.states, batch, rates, limits, seeds)
        return dataclasses.replace(group, states=states), jax.device_get(metrics)

    def _mapped(self, program: Program) -> Callable:
        """The step of a program for several runs, whose arguments have runs first; consumes the states."""

        def one(
            state: TrainState, batch: Batch, rate: jax.Array, limit: jax.Array, seed: jax.Array
        ) -> tuple[TrainState, Metrics]:
            return program.step_of(seed)(state, batch, rate, limit)

        if program.step_of not in self._compiled:
            self._compiled[program.step_of] = jax.jit(jax.vmap(one), donate_argnums=0)
        return self._compiled[program.step_of]


@jax.jit
def _stacked(states: Sequence[TrainState]) -> TrainState:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)


@jax.jit
def _one_of(states: TrainState, place: ArrayLike) -> TrainState:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, place, keepdims=False), states)
