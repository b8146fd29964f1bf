"""The rehearsal of a run on devices that are not there."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vl_jax import experiment, sharding
from vl_jax.cli import main
from vl_jax.fit import chips, program_text, rehearsal, search
from vl_jax.fit import experiment as fit_experiment
from vl_jax.fit.chips import GIB
from vl_jax.kernels import aot
from vl_jax.nn.embedding import look_up
from vl_jax.nn.layers import as_used
from vl_jax.report import fit as page
from vl_jax.schema import ConfigError
from vl_jax.train.program import Program

MESH = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4))
PROGRAM = """HloModule jit_step

%wide.cond (p: (s32[], bf16[8,4])) -> pred[] {
  %p = (s32[]{:T(128)}, bf16[8,4]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[]{:T(128)} constant(11)
  ROOT %less = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%wide.body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]) parameter(0)
  %w = bf16[2,4]{1,0} get-tuple-element(%p), index=1
  %g = bf16[8,4]{1,0:T(8)} all-gather(%w), channel_id=3, replica_groups=[2,4]<=[8], metadata={op_name="mlp"}
  %again = bf16[8,4]{1,0} all-gather(%w), channel_id=3, replica_groups=[2,4]<=[8]
}

%fused (a: f32[16]) -> f32[16] {
  %a = f32[16]{0} parameter(0)
  ROOT %r = f32[16]{0} all-reduce(%a), channel_id=4, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
}

%all-reduce-scatter.1 (b: f32[32]) -> f32[8] {
  %b = f32[32]{0} parameter(0)
  %sum = f32[32]{0} all-reduce(%b), channel_id=8, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %s = f32[8]{0} dynamic-slice(%sum, %n), dynamic_slice_sizes={8}
}

ENTRY %main (x: bf16[2,4]) -> bf16[8,4] {
  %x = bf16[2,4]{1,0} parameter(0)
  %loop = (s32[], bf16[8,4]) while(%x), condition=%wide.cond, body=%wide.body
  %f = f32[16]{0} fusion(%x), kind=kCustom, calls=%fused
  %k = f32[8]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %s = (bf16[2,4], bf16[8,4]) all-gather-start(%x), channel_id=5, replica_groups=mesh['a'=2,'b'=4] {'b'}
  %q = bf16[6]{0} collective-permute(%x), channel_id=6, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %t = (f32[2]{0}, s32[3]{0}) all-reduce(%x, %x), channel_id=7, replica_groups={}, to_apply=%add
}
"""


def test_collectives_are_read_with_bytes_axes_and_the_turns_of_loops():
    found = {item.name or item.kind: item for item in program_text.collectives(PROGRAM, MESH)}
    in_loop = found.pop("mlp")
    assert (in_loop.size, in_loop.axes, in_loop.times, in_loop.dtypes) == (64, ("fsdp",), 11, ("bf16",))
    by_kind = [
        (c.kind, c.size, c.axes, c.times) for c in program_text.collectives(PROGRAM, MESH) if not c.name
    ]
    assert sorted(by_kind) == [
        ("all-gather", 64, ("fsdp",), 1),
        ("all-reduce", 20, ("data", "fsdp"), 1),
        ("all-reduce", 64, ("data",), 1),
        ("collective-permute", 12, ("fsdp",), 1),
        ("reduce-scatter", 32, ("fsdp",), 1),
    ]


@pytest.mark.parametrize(
    "groups, axes",
    [
        ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
        ("replica_groups=[1,8]<=[8]", ("data", "fsdp")),
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", ()),  # half of an axis: not to be told
    ],
)
def test_groups_are_found_among_the_axes(groups, axes):
    line = f"  %r = f32[1]{{0}} all-reduce(%x), {groups}, to_apply=%a"
    text = f"ENTRY %main (x: f32[1]) -> f32[1] {{\n{line}\n}}\n"
    assert program_text.collectives(text, MESH)[0].axes == axes


@pytest.mark.parametrize(
    "name, message",
    [
        ("v9:2x2", "'v9' is no generation; there are: v4, v5e, v5p, v6e, tpu7x"),
        ("v5p:4x4", "a slice of v5p has 3 sides, as v5p:4x8x8"),
        ("v5e", "a slice of v5e has 2 sides"),
        ("v5e:2xx4", "a slice of v5e has 2 sides"),
    ],
)
def test_a_slice_that_does_not_exist_is_named(name, message):
    with pytest.raises(ValueError, match=f"--topology={name}: {message}"):
        chips.slice_of(name)


def test_devices_are_counted_as_jax_counts_them():
    assert [chips.slice_of(name).num_devices for name in ("v4:2x2x1", "v5e:4x4", "tpu7x:4x4x4")] == [
        8,
        16,
        128,
    ]
    assert chips.slice_of("v5p:2x2x2", 3).num_devices == 24


def test_meshes_of_a_search_are_the_devices_and_cut_experts_that_divide():
    found = list(search.meshes(8, experts=6))
    assert all(m.data * m.fsdp * m.expert * m.tensor == 8 for m in found)
    assert {m.expert for m in found} == {1, 2} and len(found) == len(set(found))
    settings = search.settings(devices=8, rows=(4, 16), accumulations=(1, 2))
    assert settings
    for s in settings:
        assert s.rows % (s.accumulation * s.mesh.data * s.mesh.fsdp * s.mesh.expert) == 0


@pytest.fixture(scope="module")
def quickstart():
    return experiment.load("quickstart", [("mesh.fsdp", "2"), ("mesh.expert", "2")])


@pytest.mark.slow
def test_exact_bytes_are_those_of_a_state_that_exists(quickstart):
    layout = experiment.plan(quickstart)
    program = Program.of(layout, quickstart.stages[-1])
    example = experiment.example_batch(quickstart, sharding.batch_axes(layout.mesh))
    variables = experiment.first_weights(quickstart, layout)
    state = program.begin(variables, jax.random.key(0))
    device = jax.devices()[0]
    for abstract, real in (
        (program.abstract_state.params, state.params),
        (program.abstract_state.optimizer, state.optimizer),
    ):
        shards = [
            s.data.nbytes
            for leaf in jax.tree.leaves(real)
            for s in leaf.addressable_shards
            if s.device == device
        ]
        assert rehearsal.on_device(abstract) == sum(shards)
    batch = rehearsal.abstract_batch(layout, example, 16)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(batch)} == {16}


@pytest.fixture
def eight_here(monkeypatch):
    """Slices of eight devices are those of this process."""
    monkeypatch.setattr(chips.Slice, "devices", lambda self: jax.devices()[: self.num_devices])


@pytest.mark.slow
def test_a_search_ranks_what_divides_and_counts_the_model_once(eight_here, monkeypatch):
    counted = []
    flops = fit_experiment._flops
    monkeypatch.setattr(fit_experiment, "_flops", lambda *a: counted.append(1) or flops(*a))
    small = experiment.load("quickstart", [("stages.sft.batch_size", "2"), ("evaluation.batch_size", "64")])
    found = fit_experiment.search(small, chips.slice_of("v5e:2x4"), stage="sft", most=0)
    assert len(counted) == 1 and found and all(rehearsal.fits for _, rehearsal in found)
    assert {setting.mesh.tensor for setting, _ in found} == {4, 8}  # two rows take two shards at most


def test_a_search_that_finds_nothing_says_why(eight_here, quickstart, monkeypatch):
    where = chips.slice_of("v5e:2x4")
    for call in (fit_experiment.search, fit_experiment.rehearse):
        with pytest.raises(ConfigError, match="^--stage=sfd: the experiment has alignment"):
            call(quickstart, where, stage="sfd")
    with pytest.raises(ConfigError, match="^--stage=sfd: the experiment has alignment"):
        next(fit_experiment.smallest(quickstart, stage="sfd"))
    monkeypatch.setattr(fit_experiment, "settings", lambda **_: [])
    with pytest.raises(ConfigError, match="^--search: no setting is for v5e:2x4; the last: batch_size=16"):
        fit_experiment.search(quickstart, where)

    def missing(_):
        raise ValueError("--topology: no libtpu")

    monkeypatch.setattr(chips.Slice, "devices", missing)
    for call in (
        lambda: fit_experiment.search(quickstart, where),
        lambda: next(fit_experiment.smallest(quickstart)),
    ):
        with pytest.raises(ValueError, match="no libtpu"):
            call()


def _found(**changes):
    memory = rehearsal.DeviceMemory(2 * GIB, 4 * GIB, 0, GIB, 3 * GIB, 16 * GIB)
    estimate = rehearsal.StepBound(1e12, 0.01, 0.02, 0.005, 0.02, 0.25)
    mesh = {"data": 2, "fsdp": 4}
    base = rehearsal.Rehearsal("sft", "v5e:2x4", 1, 8, mesh, 16, memory, [], None, estimate, 3.0, True)
    return dataclasses.replace(base, **changes)


def test_what_does_not_fit_comes_last_and_the_faster_first():
    setting = search.Setting(sharding.MeshConfig(), 16, 1, "")
    slow = _found(estimate=dataclasses.replace(_found().estimate, seconds=0.2))
    large = _found(memory=dataclasses.replace(_found().memory, temporaries=20 * GIB))
    refused = _found(refusal="needs 20 GiB, a device has 16 GiB")
    ranked = [r for _, r in search.rank([(setting, r) for r in (large, slow, refused, _found())])]
    assert ranked[:2] == [_found(), slow] and not large.fits and not refused.fits


def test_a_program_compiled_with_less_effort_is_close_to_the_limit_before_it_is_past_it():
    memory = _found().memory  # 10 of 16 GiB, 3 of them temporaries
    near = dataclasses.replace(memory, temporaries=7 * GIB)
    assert not _found(thorough=False).is_close and _found(thorough=False, memory=near).is_close
    assert not _found(memory=near).is_close  # what was compiled is what runs
    past = dataclasses.replace(memory, temporaries=20 * GIB)
    assert not _found(thorough=False, memory=past).is_close and not _found(memory=past).fits


def test_a_rehearsal_is_written_as_text_json_and_page():
    found = _found(findings=[rehearsal.Remark("whole on every device", "a/b", "cut it", 1 << 21)])
    written = json.loads(json.dumps(page.as_json(found)))
    assert written["memory"]["total"] == 10 * GIB and written["fits"] is True
    titles = [title for title, _ in page.tables_of(found)]
    assert "fits" in titles[0] and "To look at" in titles


@pytest.mark.parametrize(
    "options, message",
    [
        ((), "fit needs --topology"),
        (("--topology=v5e:2x4", "--smallest"), "fit needs --topology"),
        (
            ("--topology=v5e:2x4", "--stage=sfd"),
            "--stage=sfd: the experiment has alignment, pretraining, sft",
        ),
        (("--topology=v5e:2x4", "--config.mesh.data=3"), "does not divide the 8 device"),
    ],
)
@pytest.mark.tpu_aot
def test_mistakes_end_in_one_line(options, message, capsys):
    assert main(["fit", "--config=quickstart", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


@pytest.mark.tpu_aot
def test_the_quickstart_fits_eight_chips_and_says_what_travels(quickstart):
    found = fit_experiment.rehearse(quickstart, chips.slice_of("v5e:2x4"), stage="sft")
    assert found.fits and found.compile_seconds > 0
    assert found.memory.parameters > 0 and found.memory.temporaries > 0
    if found.collectives is not None:  # jax 0.10 cannot show every program
        assert {"fsdp", "expert"} <= {axis for item in found.collectives for axis in item.axes}
    assert not [f for f in found.findings if f.is_fault], found.findings
    assert np.isfinite(found.estimate.seconds) and 0 < found.estimate.mfu <= 1


@pytest.mark.tpu_aot
def test_no_device_of_a_tpu_sums_the_gradient_of_the_table_whole():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=8), aot.devices("v5e:2x4"))
    places = [NamedSharding(mesh, spec) for spec in (P(None, "fsdp"), P("fsdp"))]
    table = jax.ShapeDtypeStruct((32_768, 1280), jnp.float32, sharding=places[0])
    tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32, sharding=places[1])

    def step(table, tokens):
        def loss(table):
            return jnp.sum(look_up(as_used(table, jnp.bfloat16, "vocab", "embed"), tokens) ** 2)

        gradient = jax.grad(loss)(table)
        return table - gradient, jnp.sum(gradient**2)

    with sharding.use_mesh(mesh):
        compiled = aot.compile_absent(jax.jit(step, donate_argnums=0).lower(table, tokens), quick=True)
    found = program_text.collectives(compiled.as_text(), mesh)
    large = {(item.kind, item.dtypes) for item in found if item.size > rehearsal.LARGE}
    assert large == {("all-gather", ("bf16",)), ("reduce-scatter", ("bf16",))}
