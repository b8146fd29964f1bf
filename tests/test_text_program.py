"""Steps on batches without pictures: a program of their own, which computes what the whole one does."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from test_gate_model import model_of
from test_packed import CONFIG, SPEC

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.batch import TILES, Batch, without_pictures
from vl_jax.data.stream.packed import PackedIterator
from vl_jax.data.stream.pipeline import TrainIterator
from vl_jax.fusion.budget import BudgetConfig
from vl_jax.layout import Variables, put_batch
from vl_jax.model import VisionLanguageConfig
from vl_jax.sharding import MeshConfig
from vl_jax.train import lockstep, loop
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.next_token import NextToken
from vl_jax.train.program import programs
from vl_jax.train.stages import Stage
from vl_jax.train.step import TrainState, gradients

VISION = ("encoder/", "adapter/", "/gate/", "language/gate_looks")
STAGE = Stage("all", steps=6, batch_size=4)


def text(seed: int, fusion: str = "gated", *, tiles: int = 0) -> Batch:
    """Eight questions without a picture, beside room for some."""
    rows = [[tiny.example(10 * seed + i, fusion=fusion, text=5 + i % 4, tiles=tiles)] for i in range(8)]
    return tiny.batch(rows, fusion=fusion, length=14)


@functools.partial(jax.jit, static_argnames=("model", "accumulation"))
def step_of(model: VisionLanguageConfig, params: Any, routing: Any, batch: Batch, accumulation: int) -> Any:
    """The gradients of everything, and the figures."""
    state = TrainState(step=np.int32(0), params=params, optimizer=None, routing=routing)
    options = {"trainable": set(params_lib.flatten(params)), "accumulation": accumulation}
    return gradients(state, batch, model=model.build(), **options)[:2]


@pytest.mark.parametrize(
    ("model", "accumulation"),
    [
        pytest.param(model_of("layer"), 1, id="gated"),
        pytest.param(model_of("token", hard=True), 2, id="tokens"),
        pytest.param(tiny.config("loss_free"), 2, id="prefix"),
    ],
)
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.slow
def test_losses_and_gradients_are_those_of_the_whole_program(model, accumulation, devices):
    mesh = MeshConfig() if devices == 1 else MeshConfig(data=2, fsdp=2, tensor=2)
    layout, (params, routing) = tiny.layout_of(model, mesh, devices=devices), tiny.build(model)
    params = jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), params, layout.params)
    batch = text(0, model.fusion.kind)
    with sharding.use_mesh(layout.mesh, layout.rules):
        (whole, figures), (grads, found) = (
            jax.device_get(step_of(model, params, routing, put_batch(b, layout), accumulation))
            for b in (batch, without_pictures(batch))
        )
    for name in ("loss", "accuracy", "auxiliary_loss"):
        np.testing.assert_allclose(found[name], figures[name], atol=1e-6, rtol=1e-6, err_msg=name)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(whole))
    for path, grad in params_lib.flatten(grads).items():
        expected = params_lib.flatten(whole)[path]
        np.testing.assert_allclose(grad, expected, atol=1e-6 * largest, rtol=0, err_msg=path)
        if any(part in path for part in VISION):
            assert not grad.any() and not expected.any(), path


@pytest.mark.slow
def test_its_program_has_no_operation_of_the_tower_the_adapter_or_the_gate():
    model = model_of("layer")
    params, routing = tiny.build(model)

    def parts(batch: Batch) -> str:
        compiled = step_of.lower(model, params, routing, batch, 1).compile().as_text() or ""
        return "\n".join(re.findall(r'op_name="([^"]*)"', compiled))

    named = ("encoder", "adapter", "gate")
    assert not [name for name in named if name in parts(without_pictures(text(0)))]
    assert all(name in parts(text(0)) for name in named)


TRACED: list[int] = []  # the room for pictures of each program that was traced


@dataclasses.dataclass(frozen=True)
class Noting(NextToken):
    """Notes when it is traced."""

    def __call__(self, params: Any, state: Any, batch: Batch, **options: Any) -> Any:
        TRACED.append(batch.tiles.shape[1])
        return super().__call__(params, state, batch, **options)


class Mixed:
    """Batches with pictures and, where ``said`` is false, without."""

    skipped: dict[str, int] = {}  # noqa: RUF012

    def __init__(self, said: tuple[bool, ...], *, told: bool = True):
        self._said, self._told, self._at, self.absent = said, told, 0, frozenset()

    def __next__(self) -> Batch:
        has = self._said[self._at % len(self._said)]
        self._at += 1
        self.absent = frozenset() if has or not self._told else frozenset({TILES})
        return text(self._at, tiles=int(has))

    def get_state(self) -> dict[str, Any]:
        return {"at": self._at}

    def set_state(self, state: dict[str, Any]) -> None:
        self._at = state["at"]

    def close(self) -> None:
        pass


def courses(folder: Path, made: Any, streams: list[Mixed]) -> list[Any]:
    """One run for every stream."""
    layout = made[0].layout

    def begin() -> Variables:
        params, routing = jax.tree.map(np.asarray, tiny.build(layout.model.config))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, layout.params)
        return Variables(jax.device_put(params, shardings), jax.device_put(routing, layout.replicated))

    def one(number: int, stream: Mixed, stop: Any) -> loop.Course:
        return loop.course(
            layout,
            made,
            lambda stage: stream,
            begin=begin,
            workdir=folder / str(number),
            config=LoopConfig(log_every=1),
            seed=0,
            stop=stop,
            quiet=True,
        )

    return [functools.partial(one, number, stream) for number, stream in enumerate(streams)]


@pytest.mark.slow
def test_a_run_has_two_programs_and_ends_as_it_would_with_one(tmp_path):
    layout, said = tiny.layout_of(model_of("layer")), (True, False, True, False, False, True)
    ended, traced = [], []
    for told in (True, False):
        TRACED.clear()
        made = programs(layout, (dataclasses.replace(STAGE, objective=Noting()),))
        run = courses(tmp_path / str(told), made, [Mixed(said, told=told)])[0]
        ended.append(jax.device_get(loop.drive(run(lambda: None)).params))
        traced.append(list(TRACED))
    assert traced == [[tiny.TILES, 0], [tiny.TILES]]
    for found, expected in zip(*map(jax.tree.leaves, ended), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.slow
def test_runs_in_lockstep_read_text_alone_where_none_has_a_picture(tmp_path, monkeypatch):
    tiles: list[int] = []
    original = lockstep._Taking._mapped

    def noting(self: Any, program: Any) -> Any:
        step = original(self, program)

        def noted(states: Any, batch: Batch, *rest: Any) -> Any:
            tiles.append(batch.tiles.shape[2])
            return step(states, batch, *rest)

        return noted

    monkeypatch.setattr(lockstep._Taking, "_mapped", noting)
    layout = tiny.layout_of(model_of("layer"))
    made = programs(layout, (dataclasses.replace(STAGE, steps=3),))
    streams = [Mixed((False, False, True)), Mixed((False, True, True))]
    ends = lockstep.drive(courses(tmp_path, made, streams), layout=layout, seeds=(0, 1), stop=lambda: None)
    assert not any(isinstance(end, Exception) for end in ends)
    assert tiles == [0, tiny.TILES, tiny.TILES]


def test_a_model_that_cannot_read_text_alone_keeps_its_one_program():
    assert model_of("token").may_lack == tiny.config().may_lack == {TILES}
    assert not tiny.of_text(tiny.config()).may_lack
    assert BudgetConfig().tower is None


@pytest.mark.slow
def test_every_host_knows_of_the_pictures_of_all_rows():
    config = dataclasses.replace(CONFIG, image_dropout_rate=0.85)
    whole = PackedIterator(config, SPEC, batch_size=2)
    hosts = [PackedIterator(config, SPEC, batch_size=2, rows=[row]) for row in range(2)]
    told = []
    for _ in range(12):
        batch, parts = next(whole), [next(host) for host in hosts]
        has = bool(batch.visual_segment_ids.any())
        assert [TILES not in stream.absent for stream in (whole, *hosts)] == [has] * 3
        told.append((has, *(bool(part.visual_segment_ids.any()) for part in parts)))
    # Some batches have pictures in rows of one host alone, so what a host itself holds does not tell.
    assert {one[1:] for one in told if one[0]} & {(True, False), (False, True)}
    for stream in (whole, *hosts):
        stream.close()


def test_a_stream_says_whether_its_batch_has_pictures():
    config = dataclasses.replace(CONFIG, packing=None, image_dropout_rate=0.7)
    stream = TrainIterator(config, SPEC, batch_size=2)
    told = []
    for _ in range(12):
        batch = next(stream)
        told.append(TILES not in stream.absent)
        assert told[-1] == bool(batch.visual_segment_ids.any())
    stream.close()
    assert {True, False} == set(told)
