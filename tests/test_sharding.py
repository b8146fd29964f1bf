"""Mesh, rules and placement: what cannot be laid out is said, and what is asked reaches the compiler."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vl_jax import params as params_lib
from vl_jax import sharding
from vl_jax.fit import program_text
from vl_jax.nn.embedding import look_up
from vl_jax.sharding import AxisRules, MeshConfig, absent_mesh, constrain, make_mesh, mesh_of


def test_one_axis_takes_the_devices_that_remain():
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1, expert=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 2, "tensor": 1}


@pytest.mark.parametrize("sizes", [{"data": 3}, {"data": 4}, {"data": -1, "expert": 3}, {"data": 16}])
def test_a_mesh_that_does_not_divide_the_devices_is_refused(sizes):
    with pytest.raises(
        ValueError, match=r"config.mesh: .* does not divide the 8 device\(s\) here; .* must be 8"
    ):
        make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize("sizes", [{"data": 0}, {"tensor": -2}, {"data": -1, "fsdp": -1}])
def test_mesh_sizes_without_a_meaning_are_refused(sizes):
    with pytest.raises(ValueError, match="each must be >= 1, at most one may be -1"):
        MeshConfig(**sizes)


def test_rules_translate_names_to_mesh_axes():
    assert AxisRules().spec(("experts", "embed", None, "mlp")) == P("expert", "fsdp", None, "tensor")
    assert AxisRules().spec(("batch", None)) == P(("data", "fsdp", "expert"), None)
    assert AxisRules().spec(("layers", "embed")) == P(None, "fsdp")


def test_a_mesh_axis_used_twice_is_refused():
    with pytest.raises(ValueError, match=r"dimensions \('embed', 'embed'\) would use mesh axis fsdp twice"):
        AxisRules().spec(("embed", "embed"))
    with pytest.raises(ValueError, match="would use mesh axis expert, fsdp twice"):
        AxisRules(experts=("expert", "fsdp")).spec(("batch", "experts"))


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="logical axis 'width' is not one of batch, embed, experts, heads"):
        AxisRules().spec(("width",))


@pytest.mark.parametrize("fusion", tiny.FUSIONS)
@pytest.mark.slow
def test_every_parameter_has_a_name_for_each_dimension_and_divides(fusion):
    layout = tiny.layout_of(tiny.config(fusion=fusion), MeshConfig(1, 2, 2, 2), devices=8)
    leaves = params_lib.flatten(layout.params)
    assert leaves.keys() == layout.placements.keys()
    for path, placement in layout.placements.items():
        assert len(placement.names) == len(placement.spec) == leaves[path].ndim, path
        assert placement.whole == (), path
        # A matrix that is nowhere cut would be whole on every device, however many there are.
        if leaves[path].size >= 16 * 16:
            assert any(placement.spec), path


@pytest.mark.slow
def test_a_dimension_that_does_not_divide_is_kept_whole_and_named():
    layout = tiny.layout_of(tiny.config(), MeshConfig(1, 2, 1, 4), devices=8)
    placement = layout.placements["language/moe_layers/attention/query"]
    assert placement.whole == ("heads=2",)
    assert placement.spec == P(None, "fsdp", None, None)
    assert layout.placements["language/moe_layers/moe/w_in"].whole == ()


def test_the_wrong_number_of_names_is_refused():
    import flax.linen as nn

    boxed = {
        "layer": {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((2, 3), jnp.float32), ("embed",))}
    }
    with pytest.raises(ValueError, match=r"parameter layer/kernel: 1 logical names for shape \(2, 3\)"):
        sharding.place(boxed, make_mesh(MeshConfig()), AxisRules())


def test_a_constraint_is_in_the_program():
    def double(x):
        return constrain(x * 2, "batch", "mlp")

    x = jax.ShapeDtypeStruct((8, 4), jnp.float32)
    with sharding.use_mesh(make_mesh(MeshConfig(data=4, tensor=2))):
        text = jax.jit(double).lower(x).as_text()
    assert "sharding_constraint" in text and '{"tensor"}' in text
    assert "sharding_constraint" not in jax.jit(lambda x: double(x)).lower(x).as_text()


def test_rules_are_those_of_the_innermost_mesh():
    other = dataclasses.replace(AxisRules(), mlp=())
    mesh = make_mesh(MeshConfig())
    with sharding.use_mesh(mesh):
        with sharding.use_mesh(mesh, other):
            assert sharding.current_rules() == other
        assert sharding.current_rules() == AxisRules()


def test_one_device_is_no_mesh():
    with sharding.use_mesh(make_mesh(MeshConfig(), devices=jax.devices()[:1])):
        assert sharding.current_mesh() is None


def test_the_batch_is_cut_by_all_axes_but_tensor():
    assert sharding.batch_axes(make_mesh(MeshConfig(2, 1, 2, 2))) == 4


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2}, {"fsdp": 2, "expert": 2}])
@pytest.mark.parametrize("rows", [8, 3])
@pytest.mark.slow
def test_looking_up_over_a_mesh_is_looking_up_and_no_gradient_is_whole(mesh, rows):
    table = jax.random.normal(jax.random.key(0), (24, 16))
    tokens = jax.random.randint(jax.random.key(1), (rows, 5), 0, 24)
    weights = jax.random.normal(jax.random.key(2), (rows, 5, 16))

    def loss(table):
        table = sharding.constrain_weight(table, "vocab", "embed")
        return jnp.sum(look_up(table, tokens) * weights)

    plain = jax.value_and_grad(lambda table: jnp.sum(table[tokens] * weights))(table)
    mesh = make_mesh(MeshConfig(**mesh))
    with sharding.use_mesh(mesh):
        step = jax.jit(jax.value_and_grad(loss))
        found, compiled = step(table), step.lower(table).compile()
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    whole = [x for x in program_text.collectives(compiled.as_text(), mesh) if (24, 16) in x.shapes]
    assert not [x for x in whole if x.kind == "all-reduce"], whole


@pytest.mark.parametrize(
    ("text", "mesh"),
    [
        ("fsdp=64,expert=2", MeshConfig(1, 64, 2, 1)),
        ("data=2", MeshConfig(2, 1, 1, 1)),
        ("tensor=4, data=8", MeshConfig(8, 1, 1, 4)),
    ],
)
def test_a_mesh_in_words(text, mesh):
    assert mesh_of(text) == mesh
    absent = absent_mesh(mesh)
    assert tuple(absent.shape.values()) == dataclasses.astuple(mesh)
    assert NamedSharding(absent, P("data", "fsdp")).shard_shape((16, 128)) == (
        16 // mesh.data,
        128 // mesh.fsdp,
    )


@pytest.mark.parametrize(
    "text", ["", "fsdp", "fsdp=0", "fsdp=-1", "fsdp=2,fsdp=2", "model=2", "data=2;fsdp=2"]
)
def test_words_that_are_no_mesh(text):
    with pytest.raises(
        ValueError, match="must be like fsdp=8, once each; axes are data, fsdp, expert, tensor"
    ):
        mesh_of(text)
