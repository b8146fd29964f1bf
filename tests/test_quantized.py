"""Quantised checkpoints: FP8 in blocks and MXFP4 become numbers, all others are named in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_convert import assert_same_bytes
from test_surplus import mixtral, read, save

from vl_jax import params as params_lib
from vl_jax.interop import quantized
from vl_jax.interop.convert import convert
from vl_jax.interop.folder import Weights, open_weights, read_config
from vl_jax.interop.pretrained import read_published, write_published
from vl_jax.interop.safetensors import Entry, WeightsError

FP8 = {"quant_method": "fp8", "weight_block_size": [24, 40]}


def in_fp8(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The layers' matrices in blocks, and what they stand for."""
    stored, numbers, rng = {}, {}, np.random.default_rng(0)
    for key, value in tensors.items():
        if value.ndim < 2 or "layers" not in key or "gate.weight" in key:
            stored[key] = numbers[key] = value
            continue
        rows, columns = value.shape
        scale = rng.uniform(0.01, 3, (-(-rows // 24), -(-columns // 40))).astype(np.float32)
        stored[key] = (100 * value).astype(ml_dtypes.float8_e4m3fn)
        stored[key + "_scale_inv"] = scale
        wide = np.kron(scale, np.ones((24, 40), np.float32))[:rows, :columns]
        numbers[key] = stored[key].astype(np.float32) * wide
    return stored, numbers


def test_a_checkpoint_in_fp8_blocks_is_read_as_its_numbers(tmp_path):
    config, tensors = mixtral(tmp_path / "a")
    stored, numbers = in_fp8(tensors)
    _, expected = read(save(tmp_path / "plain", config, numbers))
    found, params = read(save(tmp_path / "b", {**config, "quantization_config": FP8}, stored))
    for path, value in expected.items():
        np.testing.assert_array_equal(params[path], value, err_msg=path)
    # Written after training they are plain numbers, and the config says nothing else.
    write_published(tmp_path / "out", params_lib.unflatten(params), {}, found)
    assert read_config(tmp_path / "out") == config
    back = open_weights(tmp_path / "out")
    assert set(back) == set(tensors)
    matrix = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_array_equal(back[matrix], numbers[matrix].astype(ml_dtypes.bfloat16))


def test_a_conversion_gives_quantised_tensors_back_byte_for_byte(tmp_path):
    config, tensors = mixtral(tmp_path / "a")
    stored, _ = in_fp8(tensors)
    folder = save(tmp_path / "b", {**config, "quantization_config": FP8}, stored)
    convert(folder, tmp_path / "there")
    convert(tmp_path / "there", tmp_path / "back")
    assert_same_bytes(tmp_path / "back", folder)


def weights_of(tmp_path: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Weights:
    folder = save(tmp_path / "model", {"model_type": "x", "quantization_config": config}, tensors)
    return quantized.as_numbers(folder, read_config(folder), open_weights(folder))


@pytest.mark.parametrize("scale", [np.float32(0.5), np.array([0.5], ml_dtypes.bfloat16)])
def test_fp8_may_have_one_factor_and_factors_of_activations(tmp_path, scale):
    tensors = {
        "a.weight": np.array([[1, -2], [4, 448]], ml_dtypes.float8_e4m3fn),
        "a.weight_scale_inv": np.asarray(scale),
        "a.input_scale": np.float32(1),
    }
    weights = weights_of(tmp_path, {k: np.asarray(v) for k, v in tensors.items()}, {"quant_method": "fp8"})
    assert dict(weights.entries) == {"a.weight": Entry((2, 2), np.dtype(np.float32))}
    np.testing.assert_array_equal(weights["a.weight"], [[0.5, -1], [2, 224]])


def test_stacked_experts_have_blocks_of_their_own(tmp_path):
    scale = np.array([[[1.0]], [[2.0]]], np.float32)
    tensors = {"w": np.ones((2, 3, 5), ml_dtypes.float8_e4m3fn), "w_scale_inv": scale}
    weights = weights_of(tmp_path, tensors, {"quant_method": "fp8"})
    np.testing.assert_array_equal(weights["w"], np.ones((2, 3, 5)) * scale)


def test_mxfp4_worked_by_hand(tmp_path):
    """One expert, one row of 32 numbers: byte b holds its low half first; the exponent 128 doubles."""
    blocks = np.zeros((1, 2, 1, 16), np.uint8)
    blocks[0, 0, 0, :3] = [0x21, 0xF7, 0x98]  # 0.5 1 | 6 -6 | -0 -0.5
    blocks[0, 1, 0, 15] = 0x40  # 0 2
    tensors = {"w_blocks": blocks, "w_scales": np.array([[[128], [126]]], np.uint8)}
    weights = weights_of(tmp_path, tensors, {"quant_method": "mxfp4"})
    assert dict(weights.entries) == {"w": Entry((1, 32, 2), np.dtype(np.float32))}
    found = weights["w"][0]
    np.testing.assert_array_equal(found[:7, 0], [1, 2, 12, -12, 0, -1, 0])
    assert np.signbit(found[4, 0]) and found[31, 1] == 1 and not found[:31, 1].any()


F16, U8, I32 = np.dtype(np.float16), np.dtype(np.uint8), np.dtype(np.int32)
OTHERS = {
    "gptq": (
        {"quant_method": "gptq", "bits": 4},
        {".qweight": I32, ".qzeros": I32, ".scales": F16, ".g_idx": I32},
    ),
    "awq": ({"quant_method": "awq"}, {".qweight": I32, ".qzeros": I32, ".scales": F16}),
    "bitsandbytes": ({"load_in_4bit": True}, {".weight": U8, ".weight.absmax": U8, ".weight.quant_map": F16}),
    "bitsandbytes int8": ({"load_in_8bit": True}, {".weight": np.dtype(np.int8), ".SCB": F16}),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors"},
        {".weight_packed": I32, ".weight_scale": F16},
    ),
    "fp8": ({"quant_method": "fp8"}, {".weight": np.dtype(ml_dtypes.float8_e4m3fn)}),
    "GPTQ": (None, {".qweight": I32, ".scales": F16}),
    "NVFP4": (None, {".weight": U8, ".weight_scale_2": F16}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_format_is_named_in_one_line(tmp_path, name):
    quantization, tensors = OTHERS[name]
    config, plain = mixtral(tmp_path / "a")
    config |= {"quantization_config": quantization} if quantization else {}
    layer = "model.layers.0.self_attn.q_proj"
    del plain[f"{layer}.weight"]
    more = {layer + suffix: np.ones((2, 2)).astype(dtype) for suffix, dtype in tensors.items()}
    with pytest.raises(
        WeightsError, match=f"the weights are quantised .*{name.split()[0]}.* cannot be read: "
    ) as e:
        read_published(save(tmp_path / "b", config, {**plain, **more}))
    assert "\n" not in str(e.value) and layer in str(e.value)


def test_a_config_of_a_dequantised_copy_does_not_matter(tmp_path):
    config, tensors = mixtral(tmp_path / "a")
    _, params = read(save(tmp_path / "b", {**config, "quantization_config": FP8}, tensors))
    assert params


@pytest.mark.parametrize(
    ("scale", "quantization"),
    [
        (np.ones((2, 2), np.float32), {}),
        (np.ones((1, 1), np.int32), {}),
        (np.ones(1), {"weight_block_size": [0, 1]}),
    ],
)
def test_scales_that_do_not_fit_are_named(tmp_path, scale, quantization):
    tensors = {"w": np.ones((3, 5), ml_dtypes.float8_e4m3fn), "w_scale_inv": scale}
    with pytest.raises(WeightsError, match=r"w of \(3, 5\) has scales of|weight_block_size=\[0, 1\]"):
        weights_of(tmp_path, tensors, quantization)


def test_a_folder_of_gguf_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    (tmp_path / "model-q4_k_m.gguf").write_bytes(b"GGUF")
    with pytest.raises(WeightsError, match="model-q4_k_m.gguf is quantised in the format GGUF"):
        read_published(tmp_path)
