"""Memory of a conversion: the parameters and little more than a copy of the largest, in both directions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from vl_jax.interop.folder import open_weights, write_folder
from vl_jax.interop.safetensors import Entry

MIB = 2**20
WIDTH, HIDDEN, EXPERTS, VOCABULARY = 512, 1024, 8, 16_384

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


def published(folder: Path, dtype: np.dtype, layers: int) -> dict[str, Entry]:
    """Writes a Mixtral of random weights; most of them are experts, which become two stacks."""
    shapes = {
        "model.embed_tokens.weight": (VOCABULARY, WIDTH),
        "model.norm.weight": (WIDTH,),
        "lm_head.weight": (VOCABULARY, WIDTH),
    }
    for layer in (f"model.layers.{n}" for n in range(layers)):
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        shapes |= {f"{layer}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (EXPERTS, WIDTH)
        for expert in (f"{layer}.block_sparse_moe.experts.{n}" for n in range(EXPERTS)):
            shapes |= {f"{expert}.{name}.weight": (HIDDEN, WIDTH) for name in ("w1", "w3")}
            shapes[f"{expert}.w2.weight"] = (WIDTH, HIDDEN)
    config = {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": WIDTH,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
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
        capture_output=True,
        text=True,
        check=True,
    )
    assert "WARNING" not in result.stderr, result.stderr
    return int(result.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="memory is read from /proc")
@pytest.mark.parametrize(("dtype", "layers"), [(ml_dtypes.bfloat16, 15), (np.float32, 7)])
def test_a_conversion_holds_the_parameters_and_little_more_than_the_largest(tmp_path, dtype, layers):
    entries = published(tmp_path / "published", np.dtype(dtype), layers)
    whole = sum(entry.nbytes for entry in entries.values())
    largest = layers * EXPERTS * 2 * HIDDEN * WIDTH * np.dtype(dtype).itemsize
    there = measure(tmp_path / "published", tmp_path / "ours")
    back = measure(tmp_path / "ours", tmp_path / "back")
    figures = {"whole": whole, "largest": largest, "there": there, "back": back}
    print({name: f"{size / MIB:.0f} MiB" for name, size in figures.items()})
    # A copy of the largest, what it is encoded to, and what the allocator keeps.
    assert max(there, back) < whole + 1.8 * largest, figures
    given, found = open_weights(tmp_path / "published"), open_weights(tmp_path / "back")
    assert all(np.array_equal(given[key].view(np.uint8), found[key].view(np.uint8)) for key in entries)
