"""Reading JSON piece by piece: as ``json.loads`` reads it, wherever a piece ends, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_jax.data.files import json_reader
from vl_jax.data.files.json_reader import JsonReader

FILE = Path("some/file.json")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)
WINDOWS = st.sampled_from([8, 11, 16, 1 << 22])


def small(window: int):
    return mock.patch.object(json_reader, "_WINDOW", window)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(max_size=4), st.lists(VALUES, max_size=5), max_size=4), WINDOWS, st.booleans())
@pytest.mark.slow
def test_lists_within_an_object_are_read_wherever_the_window_ends(content, window, escaped):
    data = b"\xef\xbb\xbf" * escaped + json.dumps(content, ensure_ascii=escaped, indent=1).encode()
    with small(window):
        reader, found = JsonReader(FILE, data), {}
        for key in reader.fields():
            found[key] = []
            for value, start, stop in reader.items():
                assert json.loads(data[start:stop]) == value
                found[key].append(value)
        reader.end()
    assert found == content and reader.position == len(data)


@settings(max_examples=50, deadline=None)
@given(VALUES, WINDOWS)
def test_a_value_is_read_whole(content, window):
    data = json.dumps(content, ensure_ascii=False).encode()
    with small(window):
        reader = JsonReader(FILE, data)
        assert reader.value() == (content, 0, len(data))


@pytest.mark.parametrize("window", [8, 1 << 22])
@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ('{"é": [1],\n "b": [1 2]}', "Expecting ',' delimiter: line 2 column 10"),
        ('{"é": [1],\n "é": [{]}', "Expecting property name enclosed in double quotes: line 2 column 9"),
        ('{"a": [1], 7: []}', "Expecting property name enclosed in double quotes: line 1 column 12"),
        ('{"a" [1]}', "Expecting ':' delimiter: line 1 column 6"),
        ('{"a": 1}', r"Expecting '\[' delimiter: line 1 column 7"),
        ('{"a": []', "Expecting ',' delimiter: line 1 column 9"),
        ('{"a": ["text', "Unterminated string starting at: line 1 column 8"),
        ('{"a": []}\n\n}', "Extra data: line 3 column 1"),
        ('{"a": [' + "[" * 100_000, "not JSON: "),
    ],
)
def test_what_is_no_json_is_refused_with_the_place(data, problem, window):
    reader = JsonReader(FILE, data.encode())
    with small(window), pytest.raises(ValueError, match=f"some/file.json: .*{problem}") as caught:
        for _ in reader.fields():
            for _ in reader.items():
                pass
        reader.end()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("window", [8, 1 << 22])
def test_bytes_that_are_no_utf8_are_refused_with_the_place(window):
    with small(window), pytest.raises(ValueError, match="some/file.json: not UTF-8 at byte 10"):
        list(JsonReader(FILE, '["é", "xy'.encode() + b'\xff"]').items())
