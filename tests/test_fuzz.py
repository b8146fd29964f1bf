"""Hostile inputs: every record is read or counted under a reason, every file is read or refused by name.

``VL_JAX_RECORDS=2000`` says how many malformed records of each kind there are in the slow tests.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import gc
import io
import json
import os
import random
import resource
import string
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from vl_jax.data.files import index_cache
from vl_jax.data.files.tar import walk
from vl_jax.data.sample import BadSample, Sample, Turn
from vl_jax.data.sources import array_records
from vl_jax.data.sources.build import (
    ArrayRecordConfig,
    CocoConfig,
    LabelStudioConfig,
    LlavaConfig,
    MetaConfig,
    ParquetConfig,
    Source,
    WebDatasetConfig,
    open_source,
)
from vl_jax.data.sources.conversation import parse
from vl_jax.data.sources.merged import MergedSource
from vl_jax.data.sources.records import RecordsConfig

TOO_LONG = 5.0  # seconds of processor for one small file: it hangs

KEYS = ("id", "image", "images", "conversations", "messages", "question", "answer", "text", "boxes", "width")
WORDS = (
    "human",
    "gpt",
    "user",
    "assistant",
    "system",
    "<image>",
    "<box:0>",
    "<box:99999>",
    "a.png",
    "../a.png",
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(WORDS),
    st.sampled_from(["\x00", "\ud83d", "/etc/passwd", "a" * 5000, "<|User|>", "https://x/a.png"]),
)
FIELDS = st.sampled_from(
    [*KEYS, "from", "value", "role", "content", "type", "bbox", "label", "height", "url"]
)
RECORDS = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=5),
    max_leaves=20,
)


@pytest.fixture(scope="module", autouse=True)
def _earlier_objects_apart():
    """What other tests of this process left is none of a file's time: collections pass over it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def check(found: Sample) -> None:
    """What every sample promises."""
    assert found.turns and all(isinstance(t, Turn) for t in found.turns)
    assert sum(t.question.count("<image>") for t in found.turns) == len(found.images)
    json.dumps([(t.question, t.answer) for t in found.turns]).encode()


def own_time() -> float:
    """Seconds this thread computed: neither waiting for memory nor what other threads do counts."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_utime


def outcomes(config, folder: Path) -> Counter:
    """How the records of a file end: ``ok``, a reason, or ``refused`` for the file as a whole."""
    start, result = own_time(), Counter()
    try:
        source = open_source(config, root=str(folder))
    except ValueError as error:
        assert "\n" not in str(error) and str(folder) in str(error), error
        return Counter(refused=1)
    answers = []
    for index in range(len(source)):
        try:
            sample = source[index]
            check(sample)
            answers += [turn.answer for turn in sample.turns]
            for image in sample.images:
                image()
            result["ok"] += 1
        except BadSample as error:
            assert str(folder) in str(error) and "\n" not in error.reason
            result[error.reason] += 1
    assert sorted(merged_answers(source)) == sorted(answers)
    assert own_time() - start < TOO_LONG
    return result


def merged_answers(source: Source) -> Iterator[str]:
    """What the source's samples answer where those about the same pictures are one."""
    merged = MergedSource(source, max_turns=5)
    for index in range(len(merged)):
        with contextlib.suppress(BadSample):
            check(merged[index])
            yield from (turn.answer for turn in merged[index].turns)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(RECORDS)
@pytest.mark.slow
def test_any_json_is_a_conversation_or_has_a_reason(record):
    try:
        found = parse(record, "file, record 0", default_id="x")
    except BadSample as error:
        assert "file, record 0" in str(error)
        return
    assert found.turns and sum(t.question.count("<image>") for t in found.turns) == len(found.media)


DECLARED = (9, 9)  # the size that records say a picture has


def picture(random: random.Random, *, wrong: float = 0.2) -> bytes:
    """A picture, whose size is another than the records say in a share of the cases."""
    out = io.BytesIO()
    kind = random.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
    size = (random.randint(1, 12), random.randint(1, 12)) if random.random() < wrong else DECLARED
    PilImage.new("RGB", size, (random.randint(0, 255), 0, 0)).save(out, kind)
    return out.getvalue()


def damaged(data: bytes, random: random.Random) -> bytes:
    """Bytes with some changed, cut out, repeated or added; sometimes none left."""
    result = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at, length = random.randint(0, len(result)), random.choice([1, 1, 4, 60, 600])
        way = random.randrange(6)
        if way == 0:
            result[at : at + length] = random.randbytes(len(result[at : at + length]))
        elif way == 1:
            del result[at : at + length]
        elif way == 2:
            result[at:at] = result[:length]
        elif way == 3:
            result[at:at] = random.choice(
                [b"\x00" * 512, b"\xff\xfe", b'{"a":', b"\xef\xbb\xbf", b"NaN", b"9" * 5000]
            )
        elif way == 4:
            del result[at:]
        else:
            result = bytearray() if random.random() < 0.05 else result
    return bytes(result)


def talks(random: random.Random, count: int) -> list[dict]:
    names = ["a.png", "../a.png", "/etc/hostname", "link.png", "absent.png", "a.png\x00", "a" * 300 + ".png"]
    records = []
    for i in range(count):
        turn = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It. <box:0>"}]
        wrong = [[-9, -9, 99, 99], [float("nan")] * 4, [5, 5, 1, 1], [1e308] * 4, "x"]
        box = random.choice([*[[0, 0, 3, 3]] * 9, *wrong])
        boxes = [{"label": "x", "bbox": box}]
        name = random.choice([*["a.png"] * 6, *names])
        records.append(
            {"id": i, "image": name, "conversations": turn, "boxes": boxes, "width": 9, "height": 9}
        )
    return records


def llava(folder: Path, random: random.Random):
    records, lines = talks(random, 4), random.random() < 0.5
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    encoding = random.choice(["utf-8"] * 6 + ["utf-16", "latin-1"])
    name = "d.jsonl" if lines else "d.json"
    data = text.encode(encoding)
    (folder / name).write_bytes(damaged(data, random) if random.random() < 0.7 else data)
    return LlavaConfig("x", name)


def webdataset(folder: Path, random: random.Random):
    with tarfile.open(
        folder / "d.tar", "w", format=random.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    ) as out:
        for i in range(3):
            name = random.choice(["", "../", "/", "a/" * 70]) + f"{i}"
            for ending, data in (
                (".png", picture(random)),
                (".json", json.dumps(talks(random, 1)[0]).encode()),
            ):
                member = tarfile.TarInfo(name + ending)
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
    whole = (folder / "d.tar").read_bytes()
    if random.random() < 0.8:
        (folder / "d.tar").write_bytes(damaged(whole, random))
    return WebDatasetConfig("x", "d.tar")


def coco(folder: Path, random: random.Random):
    box = random.choice(
        [[0, 0, 3, 3], [-5, -5, 50, 50], [float("nan")] * 4, [3, 3, -1, 1], [], "box", [10**400] * 4]
    )
    content = {
        "images": [{"id": 1, "file_name": random.choice(["a.png", "../a.png"]), "width": 9, "height": 9}],
        "categories": [{"id": 1, "name": random.choice(["cat", "<|ref|>", "", "猫"])}],
        "annotations": [{"image_id": 1, "category_id": random.choice([1, 2, None]), "bbox": box}],
    }
    data = json.dumps(content).encode()
    (folder / "d.json").write_bytes(damaged(data, random) if random.random() < 0.5 else data)
    return CocoConfig("x", "d.json")


def meta(folder: Path, random: random.Random):
    (folder / "f.jsonl").write_text("\n".join(map(json.dumps, talks(random, 2))))
    entry = {
        "root": random.choice([*["."] * 6, "..", "/etc", 3]),
        "annotation": random.choice([*["f.jsonl"] * 8, "../f.jsonl", "/etc/passwd", "a\0", "a" * 300, ""]),
        "repeat_time": random.choice([*[1, 2, 0.5] * 2, -1, "2", float("inf"), True]),
    }
    data = json.dumps({"x": entry}).encode()
    (folder / "m.json").write_bytes(damaged(data, random) if random.random() < 0.5 else data)
    return MetaConfig("x", "m.json")


def records(folder: Path, random: random.Random):
    made = []
    for i in range(3):
        data = picture(random)
        sample = Sample(
            str(i), (Turn("<image>\nWhat?", "It."),), (lambda d=data: PilImage.open(io.BytesIO(d)),)
        )
        encoded = array_records.encode(sample)
        made.append(damaged(encoded, random) if random.random() < 0.5 else encoded)
    array_records.write_file(folder / "d.arrayrecord", made)
    whole = (folder / "d.arrayrecord").read_bytes()
    if random.random() < 0.3:
        (folder / "d.arrayrecord").write_bytes(damaged(whole, random))
    return ArrayRecordConfig("x", "d.arrayrecord")


def parquet(folder: Path, random: random.Random):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    good = {"bytes": picture(random)}
    answer = random.choice([*["It."] * 4, 7, None])
    image = random.choice([*[good] * 6, {"bytes": b"?"}, {"path": "a.png"}, "a.png"])
    rows = [{"id": str(i), "question": "What?", "answer": answer, "image": image} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    if random.random() < 0.7:
        (folder / "d.parquet").write_bytes(damaged((folder / "d.parquet").read_bytes(), random))
    return ParquetConfig("x", "d.parquet")


def label_studio(folder: Path, random: random.Random):
    value = {"x": random.choice([1, 1, 1, -50, 1e300, "x"]), "y": 1, "width": 5, "height": 5}
    result = {
        "id": "r",
        "type": random.choice(["rectanglelabels", "textarea", "choices"]),
        "original_width": random.choice([9, 9, 9, 0, None]),
        "original_height": 9,
        "value": value | {"rectanglelabels": ["cat"], "text": ["a", 7][: random.randint(0, 2)]},
    }
    strange = ["a.png", "../a.png", "/etc/hostname", "link.png", "s3://x"]
    name = random.choice([*["/data/upload/1/a.png"] * 5, *strange])
    task = {"id": 1, "data": {"image": name}, "annotations": [{"result": [result]}]}
    data = json.dumps([task] * 3).encode()
    (folder / "d.json").write_bytes(damaged(data, random) if random.random() < 0.5 else data)
    return LabelStudioConfig("x", "d.json")


CONTAINERS = {f.__name__: f for f in (llava, webdataset, coco, meta, records, parquet, label_studio)}


@pytest.mark.parametrize("count", [30, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.slow
def test_damaged_files_are_read_counted_or_refused(tmp_path, container, count):
    if container == "records":
        pytest.importorskip("array_record")
    inside, ends = tmp_path / "inside", Counter()
    inside.mkdir()
    (tmp_path / "a.png").write_bytes(picture(random.Random(0)))
    (inside / "link.png").symlink_to(tmp_path / "a.png")
    for seed in range(count):
        chance = random.Random(f"{container}/{seed}")
        image = picture(chance)
        (inside / "a.png").write_bytes(damaged(image, chance) if chance.random() < 0.3 else image)
        ends.update(outcomes(CONTAINERS[container](inside, chance), inside))
    assert ends["ok"] and sum(ends.values()) > ends["ok"], ends  # Neither all too tame, nor all too wild.


def misled(data: bytes, random: random.Random) -> bytes:
    """A tar file of which a header says something else, with the right checksum."""
    result = bytearray(data)
    at = 512 * random.randrange(len(result) // 512)
    field = random.choice([slice(0, 100), slice(124, 136), slice(156, 157), slice(257, 263), slice(345, 500)])
    length = field.stop - field.start
    value = random.choice(
        [
            random.choice([b"L", b"x", b"g", b"S", b"5", b"\0"]),
            b"%011o\0" % random.choice([0, 1, 511, 10**9]),
            b"\x80" + random.randbytes(11),
            b"../" * 40 + b"a.png",
            random.randbytes(length),
            b"16 path=a/b.txt\n" * 7,
        ]
    )
    result[at + field.start : at + field.stop] = value[:length].ljust(length, b"\0")
    result[at + 148 : at + 156] = b" " * 8
    result[at + 148 : at + 156] = b"%06o\0 " % sum(result[at : at + 512])
    return bytes(result)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_tar_file_that_misleads_is_read_or_refused(tmp_path, count):
    ends, file = Counter(), tmp_path / "d.tar"
    for seed in range(count):
        chance = random.Random(f"misled/{seed}")
        config = webdataset(tmp_path, chance)
        for _ in range(chance.randint(1, 3)):
            if file.stat().st_size >= 512:
                file.write_bytes(misled(file.read_bytes(), chance))
        ends.update(outcomes(config, tmp_path))
        with contextlib.suppress(ValueError):
            for _, start, size in walk(file):
                assert 512 <= start <= start + size <= file.stat().st_size
    assert ends["ok"] and ends["refused"], ends


def whole_tar(folder: Path):
    members = [("a.png", picture(random.Random(0))), ("a.json", b'{"question": "What?", "answer": "It."}')]
    with tarfile.open(folder / "d.tar", "w") as out:
        for name, data in [*members, ("b.txt", b"one"), ("c.png", b"two")]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            out.addfile(member, io.BytesIO(data))
    return WebDatasetConfig("x", "d.tar")


def whole_list(folder: Path):
    (folder / "d.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}, 3]))
    return LlavaConfig("x", "d.json")


def whole_coco(folder: Path):
    (folder / "a.png").write_bytes(picture(random.Random(0), wrong=0))
    images = [{"id": i, "file_name": "a.png", "width": 9, "height": 9} for i in range(3)]
    boxes = [{"image_id": i // 2, "category_id": 1, "bbox": [0, 0, 3, 3]} for i in range(4)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}
    (folder / "d.json").write_text(json.dumps(content))
    return CocoConfig("x", "d.json")


@pytest.mark.parametrize("count", [100, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", [whole_tar, whole_list, whole_coco])
@pytest.mark.slow
def test_a_kept_index_that_misleads_points_into_the_file_or_is_made_anew(tmp_path, monkeypatch, make, count):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "_WORTH", 0)
    config = make(tmp_path)
    size, honest = (tmp_path / config.file).stat().st_size, outcomes(config, tmp_path)
    assert honest["ok"] == 2 and sum(honest.values()) == 3
    (index,) = (tmp_path / "cache" / "vl_jax" / "index").iterdir()
    whole, read = index.read_bytes(), os.pread
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "pread", lambda fd, n, at: asked.append((at, n)) or read(fd, n, at))
    ends = Counter()
    for seed in range(count):
        chance, data = random.Random(f"index/{seed}"), bytearray(whole)
        start = data.index(b"\n", 9) + 1
        at = start + 8 * chance.randrange((len(data) - start) // 8)
        value = chance.choice([0, 1, -1, 7, 512, size, size - 1, 2**62, -(2**63), 1 << 32])
        data[at : at + 8] = value.to_bytes(8, "little", signed=True)
        index.write_bytes(b"%08x\n" % zlib.crc32(data[9:]) + data[9:])
        asked.clear()
        ends[outcomes(config, tmp_path) == honest] += 1
        # What is walked over again is read a page at a time, which may end behind the file.
        assert all(0 <= place <= size and n <= max(size - place, 4096) for place, n in asked)
    assert ends[True] and ends[False]


@pytest.mark.parametrize("count", [200, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_damaged_pictures_are_decoded_or_corrupt(tmp_path, count):
    ends = Counter()
    (tmp_path / "d.json").write_text(json.dumps([{"question": "What?", "answer": "It.", "image": "a.png"}]))
    for seed in range(count):
        chance = random.Random(seed)
        (tmp_path / "a.png").write_bytes(damaged(picture(chance), chance))
        ends.update(outcomes(LlavaConfig("x", "d.json", max_pixels=10_000), tmp_path))
    assert (
        ends.keys() <= {"ok", "corrupt_image", "image_too_large", "unknown_levels"}
        and ends["ok"]
        and ends["corrupt_image"]
    )


def test_deep_and_long_json_is_refused(tmp_path):
    for text in ("[" * 200_000, '{"a":' * 50_000, "[" + "9" * 100_000 + "]", string.printable * 1000):
        (tmp_path / "d.json").write_text(text)
        (tmp_path / "d.jsonl").write_text(text.replace("\n", " "))
        assert outcomes(LlavaConfig("x", "d.json"), tmp_path) in ({"refused": 1}, {"not_an_object": 1})
        found = outcomes(LlavaConfig("x", "d.jsonl"), tmp_path)
        assert found.keys() <= {"not_json", "not_an_object"} and found


TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It.", "weight": 1}]
CHAT = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]}]
PLACE = {"x": 10, "y": 10, "width": 20, "height": 20, "rotation": 0}
ELLIPSE = {"x": 5, "y": 5, "radiusX": 2, "radiusY": 2}
DRAWN = {"id": "r", "original_width": 9, "original_height": 9, "to_name": "image", "from_name": "l"}
GOOD_RECORDS = (
    {"id": "1", "image": "a.png", "conversations": TALK, "system": "Be brief.", "tools": "[]", "weight": 0.5},
    {"messages": [*CHAT, {"role": "assistant", "content": "It."}], "source": "web"},
    {"instruction": "What?", "input": "x", "output": "It.", "history": [["Hi", "Ho"]], "images": ["a.png"]},
    {"question": "Where?", "answer": "<box:0>", "boxes": [{"label": "x", "bbox": [0, 0, 3, 3]}], "width": 9},
    {"caption": "It.", "image": "a.png", "frames": ["a.png"], "lang": "en"},
)
GOOD_TASK = {
    "id": 1,
    "data": {"image": "a.png", "question": "What?"},
    "annotations": [
        {
            "result": [
                {**DRAWN, "type": "rectangle", "value": PLACE},
                {**DRAWN, "type": "labels", "value": {**PLACE, "labels": ["cat"]}},
                {**DRAWN, "type": "choices", "value": {"choices": ["good"]}},
                {**DRAWN, "id": "e", "type": "ellipse", "value": ELLIPSE},
                {**DRAWN, "id": "t", "type": "textarea", "value": {"text": ["It."]}},
            ]
        }
    ],
}
HOSTILE: list = [None, True, 0, -1, 1e308, float("nan"), 10**400, "", "\0", "\ud83d", "a\nb", "<image>"]
HOSTILE += ["../a.png", "<|ref|>"]
HOSTILE += [
    "https://x/a.png",
    "/etc/passwd",
    "x" * 100_000,
    "1e400",
    [],
    {},
    [[]],
    {"a": []},
    "<|det|>",
    "None",
]
FLAT = {"id": "7", "image": "a.png", "text": "It.", "label": "dress", "lang": "en"}
FIELDS_OF_FLAT = RecordsConfig("x", "d.json", image="image", text="text", labels=("label",), language="lang")
# Pictures that are none, or not whole; one that says it is huge; one that nobody ever writes to.
WRONG_PICTURES = ("text.png", "cut.jpg", "bomb.png", "empty.png", "folder.png", "pipe.png", "absent.png")
HOSTILE += WRONG_PICTURES
MANY = int(os.environ.get("VL_JAX_RECORDS", "600"))


def malformed(value, random: random.Random):
    """A copy of which some part is another value, another key, gone, or there twice."""
    if random.random() < 0.15 or not isinstance(value, dict | list) or not value:
        return random.choice(HOSTILE)
    if isinstance(value, list):
        place = random.randrange(len(value))
        inner = [malformed(value[place], random)] * random.choice([1, 1, 1, 0, 2])
        return [*value[:place], *inner, *value[place + 1 :]]
    key, way = random.choice(list(value)), random.random()
    rest = {k: v for k, v in value.items() if k != key}
    if way < 0.1:
        return rest
    if way < 0.2:
        return {**rest, random.choice([key.upper(), key[:-1], "\ud83d", "x" * 5000]): value[key]}
    return {**value, key: malformed(value[key], random)}


def wrong_pictures(folder: Path) -> None:
    out = io.BytesIO()
    PilImage.new("RGB", (64, 64)).save(out, "JPEG")
    (folder / "cut.jpg").write_bytes(out.getvalue()[:200])
    out = io.BytesIO()
    PilImage.new("RGB", (1, 1)).save(out, "PNG")
    bomb = bytearray(out.getvalue())
    bomb[16:24] = (60_000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(bomb)
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")


def malformed_lines(folder: Path, wrong: list, rng: random.Random) -> LlavaConfig:
    """A record a line, with marks of order, ends of lines of other systems, empty lines and damaged ones."""
    lines = []
    for record in wrong:
        line = json.dumps(record).encode()
        lines += [damaged(line, rng) if rng.random() < 0.2 else line, b""][: rng.choice([1, 1, 1, 2])]
    first = rng.choice([b"", b"\xef\xbb\xbf"])
    (folder / "d.jsonl").write_bytes(first + b"\r\n".join(lines))
    return LlavaConfig("x", "d.jsonl")


def malformed_table(folder: Path, wrong: list, rng: random.Random) -> RecordsConfig:
    """A table of which cells are missing, too many, very long, or damaged."""
    rows = []
    for record in wrong:
        cells = list(record.values()) if isinstance(record, dict) else [record]
        out = io.StringIO()
        csv.writer(out).writerow([str(cell) for cell in cells])
        row = out.getvalue().encode("utf-8", errors="surrogatepass")
        rows.append(damaged(row, rng) if rng.random() < 0.2 else row)
    (folder / "d.csv").write_bytes(",".join(FLAT).encode() + b"\r\n" + b"".join(rows))
    return dataclasses.replace(FIELDS_OF_FLAT, file="d.csv")


def malformed_tar(folder: Path, rng: random.Random, count: int) -> WebDatasetConfig:
    data = {"jpg": picture(rng), "txt": b"It.", "json": json.dumps(GOOD_RECORDS[0]).encode(), "cls": b"1"}
    with tarfile.open(folder / "d.tar", "w") as out:
        for number in range(count):
            for ending in rng.sample(sorted(data), rng.randint(1, 4)):
                record = json.dumps(malformed(GOOD_RECORDS[number % 5], rng)).encode()
                content = record if ending == "json" else damaged(data[ending], rng)
                member = tarfile.TarInfo(f"{rng.randrange(count)}.{ending}")
                member.size = len(content)
                out.addfile(member, io.BytesIO(content))
    return WebDatasetConfig("x", "d.tar")


def malformed_file(folder: Path, kind: str, rng: random.Random, count: int):
    if kind == "tar":
        return malformed_tar(folder, rng, count)
    if kind == "coco":
        image = {"id": 1, "file_name": "a.png", "width": 9, "height": 9}
        box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 3, 3], "iscrowd": 0}
        content: dict = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
        for number in range(count):
            own, boxes = {**image, "id": number}, [{**box, "image_id": number}]
            wrong = malformed(own, rng) if rng.random() < 0.3 else own
            content["images"].append(wrong if isinstance(wrong, dict) else {})
            wrong = malformed(boxes[0], rng)
            content["annotations"] += boxes * rng.randint(0, 2) + [wrong if isinstance(wrong, dict) else {}]
        (folder / "d.json").write_text(json.dumps(content))
        return CocoConfig("x", "d.json")
    good: list = {"label_studio": [GOOD_TASK], "flat": [FLAT], "table": [FLAT]}.get(kind, list(GOOD_RECORDS))
    wrong = [malformed(good[number % len(good)], rng) for number in range(count)]
    if kind in ("lines", "table"):
        return {"lines": malformed_lines, "table": malformed_table}[kind](folder, wrong, rng)
    (folder / "d.json").write_text(json.dumps(wrong))
    if kind == "flat":
        return FIELDS_OF_FLAT
    if kind == "meta":
        entry = {"root": ".", "annotation": "d.json", "repeat_time": 1}
        (folder / "m.json").write_text(json.dumps({"x": entry, "y": entry}))
        return MetaConfig("x", "m.json")
    return LabelStudioConfig("x", "d.json") if kind == "label_studio" else LlavaConfig("x", "d.json")


def test_what_is_no_whole_picture_is_told_apart_and_nothing_waits_for_it(tmp_path):
    wrong_pictures(tmp_path)
    records = [{"question": "What?", "answer": "It.", "image": name} for name in WRONG_PICTURES]
    (tmp_path / "d.json").write_text(json.dumps(records))
    found = outcomes(LlavaConfig("x", "d.json"), tmp_path)
    assert found == {"corrupt_image": 3, "image_too_large": 1, "missing_image": 3}
    os.mkfifo(tmp_path / "pipe.json")
    for config in (LlavaConfig, LabelStudioConfig, CocoConfig, MetaConfig):
        assert outcomes(config("x", "pipe.json"), tmp_path) == {"refused": 1}


@pytest.mark.parametrize("count", [120, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["records", "lines", "meta", "flat", "table", "label_studio", "coco", "tar"])
@pytest.mark.slow
def test_malformed_records_are_read_noted_or_counted_in_one_line_each(tmp_path, kind, count):
    rng = random.Random(f"malformed/{kind}")
    (tmp_path / "a.png").write_bytes(picture(rng, wrong=0))
    wrong_pictures(tmp_path)
    start, before = own_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source, ends = open_source(malformed_file(tmp_path, kind, rng, count), root=str(tmp_path)), Counter()
    for index in range(len(source)):
        said: list = []
        try:
            sample = source[index]
            check(sample)
            said = [*sample.notes, sample.id]
            ends["noted" if sample.notes else "ok"] += 1
            for image in sample.images:
                image()
        except BadSample as error:
            said.append(error)
            ends[error.reason] += 1
        for text in map(str, said):
            assert text.encode() and len(text.splitlines()) == 1, text
    assert (ends["noted"] or kind in ("flat", "table")) and ends["ok"] and len(ends) > 4, ends
    print(kind, dict(ends))
    assert own_time() - start < 4 * TOO_LONG * max(1, count / 600)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500 << 10  # KiB
