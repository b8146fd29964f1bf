"""JSON of others: what it may take is bounded before it is read."""

from __future__ import annotations

import time
import tracemalloc

import pytest

from vl_jax.data.images.pixels import load_image_processor
from vl_jax.data.published.processor import Processor
from vl_jax.interop.folder import read_config
from vl_jax.interop.safetensors import WeightsError, open_file
from vl_jax.runtime import json_text

BOMBS = {
    "lists": b"[" + b"[]," * 4_000_000 + b"[]]",
    "objects": b"[" + b'{"":0},' * 4_000_000 + b"0]",
    "numbers": b"[" + b"999," * 8_000_000 + b"0]",
    "levels": b"[" * 1_000_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_what_would_become_very_many_objects_is_refused(name):
    tracemalloc.start()
    with pytest.raises(ValueError, match="are allowed|too deeply"):
        json_text.parse(BOMBS[name])
    assert tracemalloc.get_traced_memory()[1] < 100_000_000
    tracemalloc.stop()


def test_length_counts_what_a_text_takes_in_memory(tmp_path):
    assert json_text.parse(b'"aaaa"', longest=6) == "aaaa"
    with pytest.raises(ValueError, match="takes 24 bytes, at most 20"):
        json_text.parse('"😀"'.encode(), longest=20)
    with (tmp_path / "x").open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(ValueError, match="at most 100000000"):
        json_text.read(tmp_path / "x")


def test_a_header_with_a_name_twice_takes_no_longer_than_any_other(tmp_path):
    entry = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    header = b"{" + b"".join(b'"%d":%b,' % (i, entry) for i in range(50_000)) + b'"49999":%b}' % entry
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    start = time.process_time()
    with pytest.raises(WeightsError, match="'49999' occurs twice"):
        open_file(path)
    assert time.process_time() - start < 10


@pytest.mark.parametrize("text", [b"[" * 100_000, b"[]", b"3", b"\xff", BOMBS["lists"]])
def test_every_config_of_a_folder_that_is_none_is_one_line(tmp_path, text):
    for name, load in {
        "preprocessor_config.json": load_image_processor,
        "processor_config.json": Processor.load,
        "config.json": read_config,
    }.items():
        (tmp_path / name).write_bytes(text)
        with pytest.raises(ValueError, match=f"{name}: ") as told:
            load(tmp_path)
        assert "\n" not in str(told.value) and len(str(told.value)) < 600
