"""What ``fit`` finds in a compiled step: whole logits, state that is spread no more, planned rooms."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vl_jax import experiment, losses, sharding
from vl_jax.fit import checks, chips, program_text, rehearsal
from vl_jax.fit import experiment as fit_experiment
from vl_jax.moe.bounded import rooms
from vl_jax.moe.bounded.rooms import Traffic
from vl_jax.report import fit as page
from vl_jax.sharding import MeshConfig

LAYOUT = tiny.layout_of(tiny.config("top_k"), MeshConfig(data=1, fsdp=2, expert=2, tensor=2), devices=8)
VOCAB = LAYOUT.model.config.language.vocab_size


def text(*shapes: str) -> str:
    lines = "\n".join(f"  %a.{n} = {shape}{{1,0}} add(%x, %y)" for n, shape in enumerate(shapes))
    return f"ENTRY %main (x: f32[2]) -> f32[2] {{\n  %x = f32[2]{{0}} parameter(0)\n{lines}\n}}\n"


def test_arrays_of_a_program_are_read_with_those_of_pairs():
    program = text("f32[2,3]") + "  ROOT %p = (bf16[4], s32[]) while(%x), condition=%c, body=%b\n"
    assert program_text.arrays(program) == {("f32", (2,)), ("f32", (2, 3)), ("bf16", (4,)), ("s32", ())}


@pytest.mark.parametrize(
    ("shape", "is_whole"),
    [
        (f"f32[2,40,{VOCAB // 2}]", True),  # two rows of a device, its part of the vocabulary
        (f"bf16[80,{VOCAB // 2}]", True),
        (f"f32[2,1,{VOCAB},40]", True),  # the whole vocabulary
        (f"f32[8,40,{VOCAB}]", True),  # of all rows
        (f"f32[2,8,{VOCAB // 2}]", False),  # a chunk
        (f"f32[16,{VOCAB}]", False),  # the table itself
        (f"f32[40,2,{VOCAB + 1}]", False),
    ],
)
def test_logits_of_all_positions_are_found(shape, is_whole, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ROWS", 8)
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 1)
    options = {"rows": 8, "size_of": program_text.size_of}
    arrays = program_text.arrays(text(shape))
    found = checks.whole_logits(arrays, LAYOUT, positions=40, **options)
    assert bool(found) is is_whole
    assert not checks.whole_logits(arrays, LAYOUT, positions=8, **options)  # a row is one chunk


def test_state_that_is_spread_no_more_after_a_step_is_found():
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8))
    cut, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    state = {
        name: jax.ShapeDtypeStruct((8, size), jnp.float32, sharding=cut)
        for name, size in (("kept", 2**16), ("lost", 2**16), ("small", 8))
    }
    places = {"kept": cut, "lost": whole, "small": whole}
    compiled = (
        jax.jit(lambda x: jax.tree.map(lambda a: a + 1, x), out_shardings=places).lower(state).compile()
    )
    found = checks.misplaced(compiled.output_shardings, state, least=rehearsal.LARGE)
    assert found == [("lost", 8 * 2**16 * 4)]


def test_what_is_planned_for_meanwhile_is_noted_once():
    one, other = (Traffic(tokens=n, top_k=2, num_experts=8, shards=4) for n in (64, 128))
    rooms.plan(one)
    with rooms.noted() as plans:
        rooms.plan(one), rooms.plan(other), rooms.plan(one)
    rooms.plan(Traffic(tokens=7, top_k=1, num_experts=8, shards=4))
    assert plans == [one, other]


@pytest.mark.slow
def test_a_step_with_a_bounded_exchange_has_no_faults_and_shows_its_rooms(monkeypatch):
    pytest.importorskip("ml_collections")
    monkeypatch.setattr(chips.Slice, "devices", lambda self: jax.devices()[: self.num_devices])
    monkeypatch.setattr(rehearsal, "LARGE", 1 << 16)
    options = [("mesh.data", "2"), ("mesh.fsdp", "2"), ("mesh.expert", "2")]
    options += [("model.moe.execution.exchange", "ragged")]
    small = experiment.load("quickstart", options)
    found = fit_experiment.rehearse(small, chips.slice_of("v5e:2x4"), stage="sft")
    kinds = {remark.what for remark in found.findings}
    assert not kinds & {"logits of all positions at once", "spread no more after the step"}
    assert "all experts gathered on every device" not in kinds
    (traffic,) = found.exchanges
    assert (traffic.shards, traffic.num_experts) == (2, small.model.moe.num_experts)
    tables = dict(page.tables_of(found))
    (title,) = [title for title in tables if title.startswith("Rooms of the exchange")]
    assert tables[title].rows[0][1].text == "2 devices"
    assert json.loads(json.dumps(page.as_json(found)))["exchanges"][0]["tokens"] == traffic.tokens
