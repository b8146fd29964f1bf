"""Conversions: every byte comes back, and memory holds no more than a few pieces, in both directions."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from vl_jax.checkpoint import Checkpointer, CheckpointError
from vl_jax.interop import rules
from vl_jax.interop.convert import convert
from vl_jax.interop.folder import Weights, open_weights, read_config, write_folder
from vl_jax.interop.pretrained import FAMILIES, Published, load_params, read_published, with_state
from vl_jax.interop.safetensors import Entry
from vl_jax.layout import abstract, plan_layout
from vl_jax.moe.stacks import init_state
from vl_jax.runtime import lazy_array
from vl_jax.sharding import MeshConfig, make_mesh

MIB = 2**20
EXPERTS = 4

# Prints the growth of the process's anonymous memory: what mapped files take can be given back at any time.
MEASURED = """
import sys, threading, time
from pathlib import Path
import jax
from vl_jax.interop.convert import convert

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

jax.numpy.zeros(3).block_until_ready()
start, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.005)

thread = threading.Thread(target=watch)
thread.start()
convert(Path(sys.argv[1]), Path(sys.argv[2]))
done.set()
thread.join()
print((peak - start) * 1024)
"""


def published(
    folder: Path, dtype: np.dtype, *, layers: int, width: int, vocabulary: int, tied: bool = False
) -> dict[str, Entry]:
    """Writes a Mixtral of random weights, and a tensor that no parameter is made of.

    The stack of the experts' input weights has layers * 2 * width**2 items, which is twice as many as that of
    their output weights, and four times as many as each of the attention's.
    """
    hidden = width // EXPERTS
    shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
        "model.rotary_emb.inv_freq": (width // 16,),
    }
    if not tied:
        shapes["lm_head.weight"] = (vocabulary, width)
    for layer in (f"model.layers.{n}" for n in range(layers)):
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{layer}.{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (EXPERTS, width)
        for expert in (f"{layer}.block_sparse_moe.experts.{n}" for n in range(EXPERTS)):
            shapes |= {f"{expert}.{name}.weight": (hidden, width) for name in ("w1", "w3")}
            shapes[f"{expert}.w2.weight"] = (width, hidden)
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
    }
    entries = {key: Entry(shape, dtype) for key, shape in shapes.items()}
    rng = np.random.default_rng(0)
    arrays = ((key, (0.02 * rng.standard_normal(s, np.float32)).astype(dtype)) for key, s in shapes.items())
    write_folder(folder, config, entries, arrays)
    return entries


def measure(source: Path, target: Path) -> int:
    """Bytes by which a conversion's memory grows, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-c", MEASURED, str(source), str(target)],
        env={**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        timeout=1800,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "WARNING" not in result.stderr, result.stderr
    return int(result.stdout)


def assert_same_bytes(found: Path, given: Path) -> None:
    after, before = open_weights(found), open_weights(given)
    assert dict(after.entries) == dict(before.entries)
    assert all(np.array_equal(before[key].view(np.uint8), after[key].view(np.uint8)) for key in before)
    assert read_config(found) == read_config(given)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.slow
def test_there_and_back_in_pieces_nothing_differs(tmp_path, monkeypatch, dtype, tied):
    monkeypatch.setattr(lazy_array, "PIECE", 10_000)
    published(tmp_path / "published", np.dtype(dtype), layers=3, width=64, vocabulary=300, tied=tied)
    (tmp_path / "published/chat_template.jinja").write_text("{{ messages }}")
    convert(tmp_path / "published", tmp_path / "ours")
    stored = list((tmp_path / "ours/checkpoints/0/params").rglob("*.*.*"))
    assert max(file.stat().st_size for file in stored) < 11_000  # what is random does not shrink
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_bytes(tmp_path / "back", tmp_path / "published")
    assert (tmp_path / "back/chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.slow
def test_routing_state_comes_back_in_its_own_dtype(tmp_path):
    sizes = "hidden_size intermediate_size moe_intermediate_size kv_lora_rank qk_nope_head_dim v_head_dim"
    fields = dict.fromkeys(sizes.split(), 16) | {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 2,
        "q_lora_rank": None,
        "qk_rope_head_dim": 8,
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "vocab_size": 64,
    }
    family = FAMILIES["deepseek_v3"]
    config = family.config(fields)
    weights = Weights({}, {})
    model = Published(tmp_path, fields, config, family.rules(config, fields, []), weights)
    state = jax.eval_shape(lambda: init_state(config.stacks))["language"]
    tree = with_state(abstract(config), state)
    entries = {
        key: Entry(entry.shape, np.dtype(np.float32 if "bias" in key else ml_dtypes.bfloat16))
        for key, entry in rules.layout(model.plan(tree), tree).items()
    }
    assert any("bias" in key for key in entries)
    rng = np.random.default_rng(0)
    arrays = ((key, rng.standard_normal(e.shape).astype(e.dtype)) for key, e in entries.items())
    write_folder(tmp_path / "published", fields, entries, arrays)
    convert(tmp_path / "published", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert_same_bytes(tmp_path / "back", tmp_path / "published")


@pytest.mark.slow
def test_parameters_of_a_conversion_are_restored_onto_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(lazy_array, "PIECE", 10_000)
    published(tmp_path / "published", np.dtype(np.float32), layers=2, width=64, vocabulary=64)
    convert(tmp_path / "published", tmp_path / "ours")
    source = read_published(tmp_path / "published")
    mesh = make_mesh(MeshConfig(1, 4, 2, 1))
    layout = plan_layout(source.config, source.config.smallest_batch(8), mesh)
    step = {"step": jax.ShapeDtypeStruct((), np.int32, sharding=layout.replicated)}
    checkpointer = Checkpointer(tmp_path / "ours/checkpoints")
    restored = checkpointer.restore(params=layout.params, training_of=lambda _: step)
    checkpointer.close()
    assert restored is not None
    expected, _ = load_params(source, layout)
    jax.tree.map(np.testing.assert_array_equal, restored[1], expected)


def test_a_checkpoint_with_a_damaged_piece_is_refused_in_one_line(tmp_path):
    published(tmp_path / "published", np.dtype(np.float32), layers=1, width=64, vocabulary=64)
    convert(tmp_path / "published", tmp_path / "ours")
    piece = max((tmp_path / "ours/checkpoints/0/params").rglob("*.*.*"), key=lambda f: f.stat().st_size)
    piece.write_bytes(piece.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="no checkpoint can be restored; step 0: ") as error:
        convert(tmp_path / "ours", tmp_path / "back")
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {"published", "ours"}


def test_a_conversion_whose_writing_fails_leaves_nothing(tmp_path, monkeypatch):
    published(tmp_path / "published", np.dtype(np.float32), layers=1, width=64, vocabulary=64)
    assemble, calls = rules._assemble, itertools.count()

    def fail_late(*args):
        if next(calls) == 20:  # the checksums are done, some parameters are stored
            raise OSError("no space left")
        return assemble(*args)

    monkeypatch.setattr(rules, "_assemble", fail_late)
    with pytest.raises(CheckpointError, match=r"is not saved in .* \(OSError: no space left\)"):
        convert(tmp_path / "published", tmp_path / "ours")
    assert next(calls) > 20
    assert {path.name for path in tmp_path.iterdir()} == {"published"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize(("dtype", "layers"), [(ml_dtypes.bfloat16, 64)])
def test_a_conversion_takes_the_memory_of_pieces_whatever_the_size_of_the_model(tmp_path, dtype, layers):
    width = 512
    size = {"layers": layers, "width": width, "vocabulary": 2 * layers * width}
    entries = published(tmp_path / "published", np.dtype(dtype), **size)
    whole = sum(entry.nbytes for entry in entries.values())
    largest = 2 * layers * width**2 * np.dtype(dtype).itemsize
    there = measure(tmp_path / "published", tmp_path / "ours")
    back = measure(tmp_path / "ours", tmp_path / "back")
    figures = {"whole": whole, "largest": largest, "there": there, "back": back}
    print({name: f"{size / MIB:.0f} MiB" for name, size in figures.items()})
    assert whole > 4 * largest, figures
    assert max(there, back) < 3 * largest, figures
    assert_same_bytes(tmp_path / "back", tmp_path / "published")
