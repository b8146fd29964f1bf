"""Files that hold their images, and mixtures of files: what is read, what is refused, and conversion."""

from __future__ import annotations

import codecs
import dataclasses
import io
import itertools
import json
import os
import tarfile
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PilImage

from vl_jax.data.files import index_cache
from vl_jax.data.sources import webdataset
from vl_jax.data.sources.build import (
    ArrayRecordConfig,
    BadSample,
    CocoConfig,
    LlavaConfig,
    MetaConfig,
    ParquetConfig,
    ScenesConfig,
    WebDatasetConfig,
    open_source,
)
from vl_jax.data.tools import convert as convert_lib
from vl_jax.data.tools.convert import convert


def png(colour: int) -> bytes:
    out = io.BytesIO()
    PilImage.new("RGB", (8, 6), (colour, 9, 9)).save(out, "PNG")
    return out.getvalue()


def talk(i: int) -> dict:
    return {"id": f"t{i}", "question": f"What is {i}?", "answer": f"It is {i}."}


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(file, "w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def sample_tars(folder: Path) -> WebDatasetConfig:
    for shard in range(2):
        members = []
        for i in range(3 * shard, 3 * shard + 3):
            members += [(f"./{i}.png", png(i)), (f"./{i}.json", json.dumps(talk(i)).encode())]
        write_tar(folder / f"s{shard}.tar", members)
    return WebDatasetConfig("w", "s*.tar")


def sample_parquet(folder: Path) -> ParquetConfig:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{**talk(i), "image": {"bytes": png(i), "path": None}} for i in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), folder / "p.parquet", row_group_size=4)
    return ParquetConfig("p", "p.parquet")


def sample_files(folder: Path) -> LlavaConfig:
    for i in range(6):
        (folder / f"{i}.png").write_bytes(png(i))
    lines = [json.dumps({**talk(i), "image": f"{i}.png"}) for i in range(6)]
    (folder / "f.jsonl").write_text("\n".join(lines))
    return LlavaConfig("f", "f.jsonl")


def sample_records(folder: Path) -> ArrayRecordConfig:
    pytest.importorskip("array_record")
    files = sample_files(folder)
    convert(files, open_source(files, root=str(folder)), folder / "out", per_file=4)
    return ArrayRecordConfig("a", "out/*.arrayrecord")


@pytest.mark.parametrize("write", [sample_files, sample_tars, sample_parquet, sample_records])
def test_the_same_samples_come_out_of_every_container(tmp_path, write):
    source = open_source(write(tmp_path), root=str(tmp_path))
    assert len(source) == 6 and "6 records" in repr(source)
    for i in range(6):
        sample = source[i]
        assert sample.id == f"t{i}" and sample.turns[0].answer == f"It is {i}."
        assert sample.turns[0].question == f"<image>\nWhat is {i}?"
        assert sample.images[0]().getpixel((0, 0)) == (i, 9, 9)


def test_a_caption_and_several_images_of_a_tar(tmp_path):
    caption = [("a/x.jpg", png(1)), ("a/x.txt", b"a red field\n"), (".hidden", b""), ("a/none.jpg", png(2))]
    two = [("b.0.png", png(3)), ("b.1.png", png(4)), ("b.json", json.dumps(talk(7)).encode())]
    write_tar(tmp_path / "s.tar", [*caption, *two])
    source = open_source(WebDatasetConfig("w", "s.tar"), root=str(tmp_path))
    assert source[0].turns[0].answer == "a red field" and source[0].id == "a/x"
    with pytest.raises(BadSample, match="no_record"):
        source[1]
    assert [image().getpixel((0, 0))[0] for image in source[2].images] == [3, 4]


METADATA = {"caption": "from json", "url": "https://x/1.jpg", "key": "0", "status": "success", "width": 8}
MEMBERS = {"jpg": png(1), "txt": b"a red field", "json": json.dumps(METADATA).encode()}


@pytest.mark.parametrize("order", list(itertools.permutations(MEMBERS)))
@pytest.mark.parametrize(
    ("text", "without", "answer"),
    [
        ("", "", "a red field"),
        ("", "txt", "from json"),
        ("caption", "", "from json"),
        ("txt", "json", "a red field"),
        ("url", "", "https://x/1.jpg"),
    ],
)
def test_a_caption_beside_metadata_is_read_in_whatever_order(tmp_path, order, text, without, answer):
    members = [(f"0.{ending}", MEMBERS[ending]) for ending in order if ending != without]
    write_tar(tmp_path / "s.tar", members)
    sample = open_source(WebDatasetConfig("w", "s.tar", text=text), root=str(tmp_path))[0]
    assert [t.answer for t in sample.turns] == [answer] and len(sample.images) == 1 and not sample.notes
    assert sample.id == "0"


def test_a_caption_that_is_not_there_is_told_with_what_is(tmp_path):
    write_tar(tmp_path / "s.tar", [(f"0.{ending}", data) for ending, data in MEMBERS.items()])
    source = open_source(WebDatasetConfig("w", "s.tar", text="captions"), root=str(tmp_path))
    with pytest.raises(BadSample, match="no member or field 'captions'.*rename 'caption' to 'captions'"):
        source[0]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("ending", ["txt", "json"])
def test_texts_are_read_in_the_encoding_that_they_tell(tmp_path, encoding, ending):
    text = json.dumps({"text": "ein Bär 熊"}, ensure_ascii=False) if ending == "json" else "ein Bär 熊"
    data = text.encode(encoding)
    data = codecs.BOM_UTF16_BE + data if encoding == "utf-16-be" else data
    write_tar(tmp_path / "s.tar", [("0.jpg", png(1)), (f"0.{ending}", data)])
    source = open_source(WebDatasetConfig("w", "s.tar"), root=str(tmp_path))
    assert source[0].turns[0].answer == "ein Bär 熊"


def test_a_text_of_another_encoding_is_counted_and_not_garbled(tmp_path):
    write_tar(tmp_path / "s.tar", [("0.jpg", png(1)), ("0.txt", "ein Bär".encode("latin-1"))])
    with pytest.raises(BadSample, match="not UTF-8 at byte 5: save it as UTF-8") as caught:
        open_source(WebDatasetConfig("w", "s.tar"), root=str(tmp_path))[0]
    assert caught.value.reason == "not_utf8"


def pairs(*names: str) -> list[tuple[str, bytes]]:
    """Members of those names; each picture and text says which of its name it is."""
    times: Counter[str] = Counter()
    members = []
    for name in names:
        times[name] += 1
        members.append((name, png(times[name]) if name.lower().endswith("jpg") else b"%d" % times[name]))
    return members


def read_tar(folder: Path, *names: str) -> tuple[list[tuple], list[str]]:
    """(id, answer, picture) of every sample, and the reasons of those that cannot be used."""
    write_tar(folder / "s.tar", [*pairs(*names)])
    source = open_source(WebDatasetConfig("w", "s.tar"), root=str(folder))
    found, reasons = [], []
    for index in range(len(source)):
        try:
            sample = source[index]
            found.append((sample.id, sample.turns[0].answer, sample.images[0]().getpixel((0, 0))[0]))
        except BadSample as error:
            reasons.append(error.reason)
    return found, reasons


def test_members_find_their_sample_wherever_they_are(tmp_path):
    expected = [("a", "1", 1), ("b", "1", 1), ("c", "1", 1)]
    apart = ("a.jpg", "b.jpg", "c.jpg", "a.txt", "b.txt", "c.txt")
    assert read_tar(tmp_path, *apart) == (expected, [])
    assert read_tar(tmp_path, "a.txt", "a.jpg", "b.jpg", "b.txt", "c.txt", "c.jpg") == (expected, [])


def test_a_name_that_comes_again_is_another_sample(tmp_path):
    twice = [("a", "1", 1), ("a", "2", 2)]
    assert read_tar(tmp_path, "a.jpg", "a.txt", "a.jpg", "a.txt") == (twice, [])
    assert read_tar(tmp_path, "a.jpg", "a.jpg", "a.txt", "a.txt") == (twice, [])
    assert read_tar(tmp_path, "a.jpg", "a.txt", "b.jpg", "b.txt", "a.jpg", "a.txt")[0] == [
        twice[0], ("b", "1", 1), twice[1],
    ]  # fmt: skip
    assert read_tar(tmp_path, "a.jpg", "a.txt", "a.txt") == (twice[:1], ["member_twice"])
    assert read_tar(tmp_path, "a.jpg", "a.jpg", "a.txt") == (twice[:1], ["no_record"])
    assert read_tar(tmp_path, "a.JPG", "a.jpg", "a.txt") == (twice[:1], ["no_record"])


def test_pictures_of_a_sample_are_in_the_order_of_their_numbers(tmp_path):
    order = [10, 2, 0]
    marks = {"text": "x"}
    members = [(f"a.{n}.png", png(n)) for n in order] + [("a.json", json.dumps(marks).encode())]
    write_tar(tmp_path / "s.tar", members)
    sample = open_source(WebDatasetConfig("w", "s.tar"), root=str(tmp_path))[0]
    assert [image().getpixel((0, 0))[0] for image in sample.images] == sorted(order)


def test_members_that_are_not_read_are_noted(tmp_path):
    talk_of = json.dumps(talk(7) | {"image": "x"}).encode()
    members = [("a.jpg", png(1)), ("a.cls", b"3"), ("a.txt", b"fine"), ("a.json", b"{")]
    write_tar(tmp_path / "s.tar", [*members, ("b.jpg", png(1)), ("b.txt", b"?"), ("b.json", talk_of)])
    source = open_source(WebDatasetConfig("w", "s.tar"), root=str(tmp_path))
    assert source[0].turns[0].answer == "fine"
    assert [note.reason for note in source[0].notes] == ["member_not_read", "not_json"]
    assert source[1].turns[0].answer == "It is 7."
    assert [note.reason for note in source[1].notes] == ["member_not_read"]


def test_links_in_a_tar_are_never_followed(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w") as archive:
        for name, kind in (("x.png", tarfile.SYMTYPE), ("x.json", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/hostname"
            archive.addfile(member)
    assert len(open_source(WebDatasetConfig("w", "s.tar"), root=str(tmp_path))) == 0


@pytest.mark.parametrize(
    ("damage", "byte"),
    [(lambda d: d[:900], 0), (lambda d: d[:1024] + b"x" * 600, 1024), (lambda d: b"hm", 0)],
)
def test_a_broken_tar_is_refused_with_the_position(tmp_path, damage, byte):
    write_tar(tmp_path / "s.tar", [("a.txt", b"x" * 500), ("b.txt", b"y" * 500)])
    (tmp_path / "s.tar").write_bytes(damage((tmp_path / "s.tar").read_bytes()))
    with pytest.raises(ValueError, match=f"s.tar: no sound uncompressed tar file at byte {byte}"):
        open_source(WebDatasetConfig("w", "s.tar"), root=str(tmp_path))


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (ParquetConfig("x", "x.parquet"), "no Parquet file"),
        (ArrayRecordConfig("x", "x.arrayrecord"), "no ArrayRecord file"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, config, name):
    pytest.importorskip("pyarrow")
    (tmp_path / config.file).write_bytes(b"something else")
    with pytest.raises(ValueError, match=name) as caught:
        open_source(config, root=str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="no such file"):
        open_source(config, root=str(tmp_path / "nowhere"))


def write_meta(folder: Path, **changes) -> MetaConfig:
    (folder / "inner").mkdir(exist_ok=True)
    sample_files(folder / "inner")
    entry = {"root": "inner", "annotation": "inner/f.jsonl", "repeat_time": 0.5, "length": 99, **changes}
    twice = {"root": "inner", "annotation": "inner/f.jsonl", "repeat_time": 2}
    (folder / "meta.json").write_text(json.dumps({"half": entry, "twice": twice}))
    return MetaConfig("m", "meta.json")


def test_a_meta_file_repeats_its_files(tmp_path):
    source = open_source(write_meta(tmp_path), root=str(tmp_path))
    assert [source[i].id for i in range(len(source))] == [f"t{i}" for i in (*range(3), *range(6), *range(6))]
    assert source[14].images[0]().size == (8, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotation": "../f.jsonl"}, "annotation='../f.jsonl' must be a path inside the data root"),
        ({"root": "/etc"}, "root='/etc' must be a path inside"),
        ({"repeat_time": 0}, "repeat_time=0 must be a number above 0"),
        ({"repeat_time": float("nan")}, "repeat_time=nan"),
        ({"annotation": "inner/absent.jsonl"}, "no such file"),
        ({"annotation": 3}, "annotation='3' must be a path"),
    ],
)
def test_a_bad_entry_of_a_meta_file_is_named(tmp_path, change, message):
    config = write_meta(tmp_path, **change)
    with pytest.raises(ValueError, match="meta.json, entry 'half': .*" + message):
        open_source(config, root=str(tmp_path))


def write_coco(folder: Path, box=(2, 1, 4, 3), **image) -> CocoConfig:
    (folder / "a.png").write_bytes(png(7))
    content = {
        "images": [{"id": 5, "file_name": "a.png", "width": 8, "height": 6, **image}, {"id": 6}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"image_id": 5, "category_id": 1, "bbox": list(box)},
            {"image_id": 5, "category_id": 2, "bbox": [0, 0, 8, 6], "iscrowd": 1},
        ],
    }
    (folder / "coco.json").write_text(json.dumps(content))
    return CocoConfig("c", "coco.json")


def test_boxes_of_coco_become_questions_about_places(tmp_path):
    source = open_source(write_coco(tmp_path), root=str(tmp_path))
    sample = source[0]
    assert [t.question for t in sample.turns] == [
        "<image>\nWhich kinds of object are visible?",
        "Locate every cat.",
    ]
    assert sample.turns[1].answer == "<|ref|>cat<|/ref|><|det|>[[250, 166, 749, 666]]<|/det|>"
    assert sample.turns[1].boxes[0].corners == (2, 1, 6, 4)
    with pytest.raises(BadSample, match=r"images\[1\]"):
        source[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"box": (float("nan"), 0, 1, 1)}, "bad_box"),
        ({"box": (9, 9, 3, 3)}, "bad_box"),
        ({"box": (1, 1, 0, 2)}, "bad_box"),
        ({"box": (1, 1)}, "bad_box"),
        ({"file_name": "../secret.png"}, "outside_root"),
        ({"width": 0}, "bad_image_field"),
        ({"id": 7}, "no_boxes"),
        ({"width": "8 px"}, "bad_image_field"),
        ({"width": 7.5}, "bad_image_field"),
        ({"id": 6}, "id_twice"),
    ],
)
def test_a_bad_picture_of_coco_has_a_reason(tmp_path, change, reason):
    source = open_source(write_coco(tmp_path, **change), root=str(tmp_path))
    with pytest.raises(BadSample) as caught:
        source[0]
    assert caught.value.reason == reason


def coco_of(folder: Path, annotations: list, images: list | None = None):
    """The first picture of a COCO file with these annotations."""
    (folder / "a.png").write_bytes(png(7))
    content = {
        "images": images or [{"id": 5, "file_name": "a.png", "width": 8, "height": 6}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 3}],
        "annotations": annotations,
    }
    (folder / "coco.json").write_text(json.dumps(content))
    return open_source(CocoConfig("c", "coco.json"), root=str(folder))[0]


written = st.sampled_from([lambda n: n, float, str, lambda n: str(float(n))])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(written, min_size=9, max_size=9), st.sampled_from([None, 0, False, "0", 0.0, "false"]))
def test_numbers_of_coco_may_be_texts_and_floats(tmp_path, ways, crowd):
    numbers = [way(n) for way, n in zip(ways, (5, 8, 6, 5, 1, 2, 1, 4, 3), strict=True)]
    image = {"id": numbers[0], "file_name": "a.png", "width": numbers[1], "height": numbers[2]}
    box = {"image_id": numbers[3], "category_id": numbers[4], "bbox": numbers[5:], "iscrowd": crowd}
    (turn,) = coco_of(tmp_path, [box], [image]).turns[1:]
    assert [(b.label, b.corners) for b in turn.boxes] == [("cat", (2, 1, 6, 4))]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bbox": [0, 0, 0, 0]}, "bad_box"),
        ({"bbox": ["x", 0, 1, 1]}, "bad_box"),
        ({"bbox": None}, "bad_box"),
        ({"bbox": [0, 0, float("inf"), 1]}, "bad_box"),
        ({"category_id": 9}, "unknown_category"),
        ({"category_id": 3}, "unknown_category"),  # It has no name.
    ],
)
def test_an_annotation_of_coco_that_cannot_be_read_is_noted_and_the_others_are_kept(tmp_path, change, reason):
    good = {"image_id": 5, "category_id": 1, "bbox": [2, 1, 4, 3]}
    sample = coco_of(tmp_path, [good, {**good, **change}, {**good, "category_id": 2}])
    assert sample.turns[0].answer == "cat, dog"
    (note,) = sample.notes
    assert note.reason == reason and "annotations[1]" in note.message


@pytest.mark.parametrize("kept_before", [False, True])
def test_annotations_of_coco_find_their_pictures_in_whatever_order(tmp_path, monkeypatch, kept_before):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_cache, "_WORTH", 0)
    names = ["3", 1, "a", 2]  # ids; of the fourth there is no box
    owners = [1, 3, "a", "1", "3", 1, 7]
    boxes = [{"image_id": o, "category_id": 1, "bbox": [n, 0, 1, 1]} for n, o in enumerate(owners)]
    content = {
        "annotations": boxes,
        "info": {"images": [1, {"annotations": []}]},
        "images": [{"id": i, "file_name": "a.png", "width": 8, "height": 6} for i in names],
        "categories": [{"id": "1", "name": "猫"}],
    }
    (tmp_path / "c.json").write_text(json.dumps(content, indent=1, ensure_ascii=False))
    for _ in range(1 + kept_before):
        source = open_source(CocoConfig("c", "c.json"), root=str(tmp_path))
    assert [[int(b.corners[0]) for b in source[i].turns[1].boxes] for i in range(3)] == [
        [1, 4],
        [0, 3, 5],
        [2],
    ]
    assert [source[i].id for i in range(3)] == ["c-3", "c-1", "c-a"]
    with pytest.raises(BadSample, match="no_boxes"):
        source[3]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not JSON: Expecting value: line 1 column 1"),
        ("[]", "expected a list under 'images'"),
        ('{"images": [], "annotations": [], "categories": {}}', "expected a list under 'categories'"),
        ('{"images": [{}, 3]}', "the entry of 'images' up to byte 17 must be an object"),
        ('{"images": [], "images": []}', "a second 'images' at byte 24"),
        ('{"images": [{"id": 1}],\n"annotations": [{]}', "not JSON: .* line 2 column 18"),
        ('{"images": [], "annotations": [], "categories": []} 7', "not JSON: Extra data: line 1 column 53"),
    ],
)
def test_a_file_that_is_not_as_coco_has_it_is_refused_with_the_position(tmp_path, text, problem):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=f"c.json: {problem}") as caught:
        open_source(CocoConfig("c", "c.json"), root=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_converted_samples_are_those_of_the_source(tmp_path):
    pytest.importorskip("array_record")
    config = ScenesConfig("s", num_examples=5)
    source = open_source(config)
    report = convert(config, source, tmp_path / "out", per_file=2)
    assert (report.records, report.skipped) == (5, {})
    again = open_source(ArrayRecordConfig("s", "out/*.arrayrecord"), root=str(tmp_path))
    for i in range(5):
        assert (again[i].id, again[i].turns) == (source[i].id, source[i].turns)
        np.testing.assert_array_equal(np.asarray(again[i].images[0]()), np.asarray(source[i].images[0]()))
        assert again[i].images[0].size() == source[i].images[0].size()


def test_conversion_counts_what_it_leaves_out_and_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    pytest.importorskip("array_record")
    config, out = sample_files(tmp_path), tmp_path / "out"
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "4.png").unlink()
    source = open_source(config, root=str(tmp_path))

    def kill(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(config, source, out, per_file=2, progress=kill)
    assert not out.exists() and (tmp_path / "out.partial").is_dir()
    read = []
    original = type(source).__getitem__
    monkeypatch.setattr(type(source), "__getitem__", lambda self, i: read.append(i) or original(self, i))
    report = convert(config, source, out, per_file=2)
    assert sorted(read) == [4, 5] and report.reasons == {"corrupt_image": 1, "missing_image": 1}
    assert convert(config, source, out, per_file=2) == report and len(read) == 2
    assert sorted(f.name for f in out.iterdir()) == [
        *(f"part-0000{i}.arrayrecord" for i in range(3)),
        "report.json",
    ]
    whole = open_source(ArrayRecordConfig("a", "out/*.arrayrecord"), root=str(tmp_path))
    assert [whole[i].id for i in range(4)] == ["t0", "t2", "t3", "t5"]
    os.utime(tmp_path / "f.jsonl", (1, 1))
    with pytest.raises(ValueError, match="not a conversion of this source as it is now"):
        convert(config, source, out, per_file=2)


def test_a_part_that_was_being_written_is_written_again(tmp_path, monkeypatch):
    pytest.importorskip("array_record")
    config = ScenesConfig("s", num_examples=4)
    write = convert_lib.array_records.write_file

    def cut(file, records):
        write(file, records)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert_lib.array_records, "write_file", cut)
        with pytest.raises(KeyboardInterrupt):
            convert(config, open_source(config), tmp_path / "out", per_file=3)
    assert convert(config, open_source(config), tmp_path / "out", per_file=3).records == 4
    assert not list((tmp_path / "out").glob("*.tmp"))
    with pytest.raises(ValueError, match="begun for another source"):
        (tmp_path / "new.partial").mkdir()
        (tmp_path / "new.partial" / "source.json").write_text("{}")
        convert(config, open_source(config), tmp_path / "new")


def write_many(file: Path, count: int) -> None:
    names = [f"shard/sample-{number:09}.{ending}" for number in range(count) for ending in ("jpg", "json")]
    write_tar(file, [(name, b"") for name in names])


@pytest.mark.slow
def test_an_index_of_tar_files_is_small(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    count = 3000
    write_many(tmp_path / "s.tar", count)
    tracemalloc.start()
    source = open_source(WebDatasetConfig("w", "s.tar"), root=str(tmp_path))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(source) == count and used < 150 * count
    with pytest.raises(BadSample, match="sample-000002999.*not_json"):
        source[count - 1]


@pytest.mark.slow
def test_tar_files_are_walked_again_only_when_one_has_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sample_tars(tmp_path)
    write_many(tmp_path / "s9.tar", 2000)
    walked, walk = [], webdataset.walk
    monkeypatch.setattr(webdataset, "walk", lambda file: walked.append(file.name) or walk(file))

    def read() -> list:
        source = open_source(WebDatasetConfig("w", "s*.tar"), root=str(tmp_path))
        assert len(source) == 2006
        return [(source[i].id, source[i].turns, source[i].images[0]().getpixel((0, 0))) for i in range(6)]

    first = read()
    assert read() == first and walked == ["s0.tar", "s1.tar", "s9.tar"]
    os.utime(tmp_path / "s1.tar", ns=(1, 1))
    assert read() == first and len(walked) == 6


def test_decoded_row_groups_are_mapped_and_follow_their_file(tmp_path):
    plain = sample_parquet(tmp_path)
    config = dataclasses.replace(plain, unpacked="decoded")

    def read(config):
        source = open_source(config, root=str(tmp_path))
        samples = [source[i] for i in reversed(range(len(source)))]
        return [(s.turns, [np.asarray(image()).tolist() for image in s.images]) for s in samples]

    assert read(config) == read(plain)
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "decoded").iterdir()}
    assert len(files) > 1 and read(config) == read(plain)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "decoded").iterdir()} == files
    os.utime(tmp_path / plain.file, ns=(1, 1))
    read(config)
    assert len(list((tmp_path / "decoded").iterdir())) == 2 * len(files)


def test_conversion_tells_what_is_left_out_of_records_that_are_kept_and_keeps_weights(tmp_path):
    pytest.importorskip("array_record")
    talks = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "It.", "weight": 0.5}]
    records = [{"conversations": talks, **extra} for extra in ({}, {"tools": "[1]"})]
    (tmp_path / "d.json").write_text(json.dumps(records))
    config = LlavaConfig("d", "d.json")
    report = convert(config, open_source(config, root=str(tmp_path)), tmp_path / "out")
    assert "1 are kept without a part of theirs" in str(report)
    assert list(report.partial) == ["1"] and "tools_not_read" in report.partial["1"][0]
    written = json.loads((tmp_path / "out" / convert_lib.REPORT).read_text())
    assert written["partial"] == report.partial
    assert convert(config, open_source(config, root=str(tmp_path)), tmp_path / "out") == report
    source = open_source(ArrayRecordConfig("a", "out/*.arrayrecord"), root=str(tmp_path))
    assert [source[i].turns[0].weight for i in range(2)] == [0.5, 0.5]
