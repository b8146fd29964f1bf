"""Compiling routed experts for TPUs that are not here: what is counted, and what every exchange moves."""

from __future__ import annotations

import json

import pytest
from pallas import one_at_a_time

from vl_jax import cli
from vl_jax.benchmarks import routing_aot
from vl_jax.benchmarks.routing import Shape

SMALL = Shape(tokens=128, width=256, hidden=128, num_experts=16, top_k=4, gated=True, dtype="bfloat16")
TEXT = """
  %a = bf16[8,128]{1,0:T(8,128)} all-to-all(%x), replica_groups={{0,1}}
  %b = (bf16[4,2]{1,0}, bf16[8,2]{1,0}, u32[], u32[]) all-gather-start(%y), dimensions={0}
  %c = bf16[8,2]{1,0} all-gather-done(%b)
  %d = (f32[3]{0}, f32[3]{0}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%z)
  %e = (s32[5]{0}, f32[2,2]{1,0}) all-reduce(%p, %q), to_apply=%sum
  ROOT %f = bf16[64,4]{1,0} ragged-all-to-all(%x, %o, %i, %s, %oo, %r)
  %h = ((bf16[8,2]{1,0}, bf16[9,2]{1,0}, s32[2]{0}), bf16[9,2]{1,0}, u32[]) ragged-all-to-all-start(%x, %o)
  %g = bf16[8,128]{1,0} fusion(%all-to-all.3), calls=%fused
"""


def test_bytes_of_collectives_are_those_of_their_results():
    assert routing_aot.collectives(TEXT) == {
        "all-to-all": 8 * 128 * 2,
        "all-gather": 8 * 2 * 2,
        "collective-permute": 3 * 4,
        "all-reduce": 5 * 4 + 4 * 4,
        "ragged-all-to-all": 64 * 4 * 2 + 9 * 2 * 2,
    }


def test_a_topology_is_for_routing_alone(capsys):
    assert cli.main(["benchmark", "step", "--topology=v5e:2x4"]) == 2
    assert "--topology is for 'benchmark routing' alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "slices", "refused"),
    [
        ((8, 8), 1, {}),
        ((16, 16), 1, {"ring, 16 devices": "is for up to 8 shards, and there are 16"}),
        ((16, 32), 2, {"ring, 32 devices": "is for up to 8 shards, and there are 16"}),
        ((1, 8), 1, {"*": "1 of 8 devices would have experts of their own"}),
    ],
)
def test_an_exchange_that_cannot_be_is_named(sizes, slices, refused):
    shards, devices = sizes
    found = routing_aot._exchanges(shards, devices, slices=slices)
    assert len(found) == 4 + (slices > 1)
    reasons = {name: value for name, value in found.items() if isinstance(value, str)}
    assert reasons == (dict.fromkeys(found, refused["*"]) if "*" in refused else refused)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["step", "--top-k=2"], "sizes of a layer are for 'benchmark routing' alone, not for step"),
        (["routing", "--slices=2"], "--slices=2 must be at least 1, and goes with --topology"),
        (["routing", "--top-k=65"], "top_k=65 must be at most num_experts=64"),
        (["routing", "--width=0"], "width=0 must be >= 1"),
    ],
)
def test_sizes_that_make_no_layer_are_named(options, message, capsys):
    assert cli.main(["benchmark", *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.tpu_aot
def test_a_table_is_compiled_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(routing_aot, "ACCELERATOR_SHAPES", (SMALL,))
    monkeypatch.setattr(routing_aot, "MODES", {"forward": lambda way: way})
    file = tmp_path / "found.json"
    with one_at_a_time():
        assert cli.main(["benchmark", "routing", "--topology=v9:2x4"]) == 2
        assert "--topology=v9:2x4: " in capsys.readouterr().err
        assert cli.main(["benchmark", "routing", "--topology=v5e:2x4", f"--json={file}"]) == 0
    (layer,) = json.loads(file.read_text())["layers"]
    found = layer["modes"]["forward"]
    print(capsys.readouterr().out)
    assert not {name: entry["error"] for name, entry in found.items() if "error" in entry}
    assert {"ours, pallas", "lax.ragged_dot", "megablox"} <= set(found)
    rows = 128 * SMALL.width  # elements of one device's tokens
    moved = {name.split(",")[0]: entry["collectives"] for name, entry in found.items() if "devices" in name}
    # All but its own tokens come, in bfloat16, and as many sums go, in float32.
    assert moved["ring"]["collective-permute"] >= 7 * rows * 2 + 7 * rows * 4
    assert "all-gather" not in moved["ring"] and "all-to-all" not in moved["ring"]
    assert (
        "collective-permute" not in moved["all_gather"] and moved["all_gather"]["all-gather"] >= 8 * rows * 2
    )
    assert "ragged-all-to-all" in moved["ragged"] and "all-to-all" in moved["all_to_all"]
