"""Published folders with more than their model needs: passed over, tied, or named; never silently wrong."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_convert import assert_same_bytes, published

from vl_jax import params as params_lib
from vl_jax.interop import rules
from vl_jax.interop.convert import convert
from vl_jax.interop.folder import open_weights, read_config, write_folder
from vl_jax.interop.pretrained import Published, read_published, write_published
from vl_jax.interop.safetensors import Entry, WeightsError
from vl_jax.layout import abstract

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"
F32 = np.dtype(np.float32)


def mixtral(folder: Path, *, tied: bool = False) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    published(folder, F32, layers=2, width=64, vocabulary=64, tied=tied)
    return read_config(folder), {key: np.array(value) for key, value in open_weights(folder).items()}


def save(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    entries = {key: Entry(value.shape, value.dtype) for key, value in tensors.items()}
    write_folder(folder, config, entries, tensors.items())
    return folder


def read(folder: Path) -> tuple[Published, dict[str, np.ndarray]]:
    """The parameters as they are loaded, on the host."""
    found = read_published(folder)
    shapes = abstract(found.config)
    tree = rules.lazily(found.plan(shapes), found.weights, shapes, ignored=found.ignored)
    flat = params_lib.flatten(tree)
    return found, {path: leaf[(slice(None),) * len(leaf.shape)] for path, leaf in flat.items()}


@pytest.mark.slow
def test_a_tied_head_that_is_stored_too_is_the_table(tmp_path):
    config, tensors = mixtral(tmp_path / "a", tied=True)
    folder = save(tmp_path / "b", config, {**tensors, HEAD: tensors[TABLE].astype(ml_dtypes.bfloat16)})
    found, params = read(folder)  # the head differs a little: bfloat16 has fewer digits
    assert found.copies == {} and "language/head/kernel" in params
    folder = save(tmp_path / "c", config, {**tensors, HEAD: tensors[TABLE]})
    found, params = read(folder)
    assert found.copies == {HEAD: TABLE} and "language/head/kernel" not in params
    # Trained further and written back, the copy is that of the new table.
    tree = params_lib.unflatten({path: value + 1 for path, value in params.items()})
    write_published(tmp_path / "out", tree, {}, found)
    back = open_weights(tmp_path / "out")
    np.testing.assert_array_equal(back[HEAD], tensors[TABLE] + 1)
    assert set(back) == set(open_weights(folder))


def test_a_tied_head_of_other_numbers_is_read_as_it_is_stored_and_said(tmp_path, caplog):
    config, tensors = mixtral(tmp_path / "a", tied=True)
    head = tensors[TABLE].copy()
    head[-1, -1] += 1
    folder = save(tmp_path / "b", config, {**tensors, HEAD: head})
    with caplog.at_level(logging.WARNING):
        _, params = read(folder)
    assert f"tie_word_embeddings is true, but {HEAD} differs from {TABLE}" in caplog.text
    np.testing.assert_array_equal(params["language/head/kernel"], head.T)
    np.testing.assert_array_equal(params["language/embedding"], tensors[TABLE])


def test_a_tied_table_may_be_stored_under_the_name_of_the_head(tmp_path):
    config, tensors = mixtral(tmp_path / "a", tied=True)
    table = tensors.pop(TABLE)
    _, params = read(save(tmp_path / "b", config, {**tensors, HEAD: table}))
    np.testing.assert_array_equal(params["language/embedding"], table)


@pytest.mark.parametrize("change", ["equal", "other", "head alone"])
@pytest.mark.slow
def test_a_conversion_keeps_what_is_stored_of_a_tied_head(tmp_path, change):
    config, tensors = mixtral(tmp_path / "a", tied=True)
    table = tensors[TABLE]
    if change == "head alone":
        del tensors[TABLE]
    folder = save(tmp_path / "b", config, {**tensors, HEAD: table + (change == "other")})
    convert(folder, tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "back")
    assert_same_bytes(tmp_path / "back", folder)


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.slow
def test_layers_for_further_tokens_are_passed_over(tmp_path, announced):
    config, tensors = mixtral(tmp_path / "a")
    more = {k.replace("layers.1.", "layers.2."): v for k, v in tensors.items() if "layers.1." in k}
    more |= {
        f"model.layers.2.{k}": np.ones(4, np.float32) for k in ("enorm.weight", "shared_head.norm.weight")
    }
    more |= {"mtp.norm.weight": np.ones(4, np.float32), "model.layers.2.embed_tokens.weight": tensors[TABLE]}
    if announced:
        config["num_nextn_predict_layers"] = 1
    else:
        more["model.layers.2.eh_proj.weight"] = np.ones((4, 8), np.float32)
    _, params = read(save(tmp_path / "b", config, {**tensors, **more}))
    _, expected = read(tmp_path / "a")
    assert params.keys() == expected.keys()


def test_a_layer_that_nobody_announced_is_named(tmp_path):
    config, tensors = mixtral(tmp_path / "a")
    more = {k.replace("layers.1.", "layers.2."): v for k, v in tensors.items() if "layers.1." in k}
    with pytest.raises(WeightsError, match=r"model.layers.2.*: no rule uses this source tensor"):
        read(save(tmp_path / "b", config, {**tensors, **more}))


@pytest.mark.parametrize("name", ["llava", "deepseek_vl"])
@pytest.mark.slow
def test_extras_of_an_image_encoder_are_passed_over(oracles, tmp_path, name):
    config = json.loads((oracles / "hf" / name / "config.json").read_text())
    tensors = dict(open_weights(oracles / "hf" / name))
    anchor = "embeddings.patch_embedding.weight"
    root = next(key.removesuffix(anchor) for key in tensors if key.endswith(anchor))
    root = root.removesuffix("vision_model.")
    extras = (
        "text_model.final_layer_norm.weight",
        "logit_scale",
        "visual_projection.weight",
        "image_newline",
    )
    more = {root + key: np.ones(3, np.float32) for key in extras}
    _, params = read(save(tmp_path / "b", config, {**tensors, **more}))
    assert params
    with pytest.raises(WeightsError, match=r"1 problems: .*surprise: no rule uses"):
        try:
            read(save(tmp_path / "c", config, {**tensors, "language_model.surprise": np.ones(3, np.float32)}))
        except WeightsError as error:
            raise WeightsError(" ".join(str(error).split())) from None


def test_tensors_of_several_dtypes_become_one_parameter(tmp_path):
    config, tensors = mixtral(tmp_path / "a")
    dtypes = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, ml_dtypes.float8_e5m2]
    mixed = {key: v.astype(dtypes[i % len(dtypes)]) for i, (key, v) in enumerate(tensors.items())}
    found, params = read(save(tmp_path / "b", config, mixed))
    plan = found.plan(abstract(found.config))
    again = dict(rules.export(plan, params_lib.unflatten(params)))
    assert all(np.array_equal(value, mixed[key].astype(np.float32)) for key, value in again.items())
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(np.float32)}
