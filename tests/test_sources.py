"""Conversation files: what is read, and how each kind of bad record is refused."""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.encode import make_encoder
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import FileImage, Sample, Turn, standalone_questions
from vl_jax.data.sources.build import BadSample, LlavaConfig, ScenesConfig, open_source


def talk(question="<image>\nWhat?", answer="A cat.", **fields):
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "r", "image": "a.png", "conversations": messages, **fields}


def write(folder: Path, records, name="data.json") -> LlavaConfig:
    PilImage.new("RGB", (6, 4), (200, 10, 10)).save(folder / "a.png")
    lines = [json.dumps(r) if not isinstance(r, str) else r for r in records]
    text = "\n".join(lines) if name.endswith("l") else "[" + ",".join(lines) + "]"
    (folder / name).write_text(text)
    return LlavaConfig("test", name)


def read(folder: Path, record, name="data.json") -> Sample:
    return open_source(write(folder, [record], name), root=str(folder))[0]


def reason_of(folder: Path, record, name="data.json") -> str:
    with pytest.raises(BadSample) as caught:
        for image in read(folder, record, name).images:
            image()
    assert "\n" not in str(caught.value) and "record 0" in str(caught.value) and name in str(caught.value)
    return caught.value.reason


def test_a_record_becomes_turns_system_text_and_images(tmp_path):
    record = talk(lang="en")
    record["conversations"] = [
        {"from": "system", "value": "Be short."},
        *record["conversations"],
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    sample = read(tmp_path, record)
    assert (sample.id, sample.system) == ("r", "Be short.")
    assert sample.turns == (
        Turn("<image>\nWhat?", "A cat.", "open", "en"),
        Turn("Sure?", "Yes.", "yes/no", "en"),
    )
    assert sample.images[0]().getpixel((0, 0)) == (200, 10, 10)


@pytest.mark.parametrize("answer", ["yes", "No.", "是", "否。"])
def test_yes_no_answers_are_a_kind_of_their_own(tmp_path, answer):
    assert read(tmp_path, talk(answer=answer)).turns[0].kind == "yes/no"


def test_records_without_image_and_with_several_images(tmp_path):
    record = talk("no picture")
    del record["image"]
    assert read(tmp_path, record).images == ()
    assert len(read(tmp_path, talk("<image> or <image>?", image=["a.png", "a.png"])).images) == 2


def test_files_open_only_when_an_image_is_asked_for(tmp_path):
    assert read(tmp_path, talk(image="absent.png")).images


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (talk(image="absent.png"), "missing_image"),
        (talk(image="../a.png"), "outside_root"),
        (talk(image="/etc/hostname"), "outside_root"),
        (talk(image="a\0.png"), "missing_image"),
        (talk(image=7), "bad_image_field"),
        (talk("<image><image>"), "placeholder_mismatch"),
        (talk("no placeholder"), "placeholder_mismatch"),
        (talk(conversations=[]), "bad_conversation"),
        (talk(conversations=[{"from": "human", "value": "<image>"}]), "bad_conversation"),
        (talk(conversations=[{"from": "robot", "value": "<image>"}]), "bad_conversation"),
        (talk(conversations=["text"]), "bad_conversation"),
        (talk(answer=3), "bad_conversation"),
        (talk(answer="half \ud83d"), "bad_conversation"),
        ([1, 2], "not_an_object"),
        ("null", "not_an_object"),
    ],
)
def test_a_bad_record_names_its_reason_and_place(tmp_path, record, reason):
    assert reason_of(tmp_path, record) == reason
    assert reason_of(tmp_path, record, "data.jsonl") == reason


def test_a_broken_line_of_json_lines_spoils_only_itself(tmp_path):
    source = open_source(write(tmp_path, [talk(), '{"id": "x", ', talk()], "data.jsonl"), root=str(tmp_path))
    assert len(source) == 3 and source[0] == source[0] and source[2].id == "r"
    with pytest.raises(BadSample, match="record 1") as caught:
        source[1]
    assert caught.value.reason == "not_json"


def test_a_link_out_of_the_image_folder_is_refused(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    PilImage.new("RGB", (2, 2)).save(tmp_path / "secret.png")
    (inside / "link.png").symlink_to(tmp_path / "secret.png")
    assert reason_of(inside, talk(image="link.png")) == "outside_root"


def test_a_huge_image_is_refused_by_its_header(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"too little"))
    (tmp_path / "huge.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels)
    assert reason_of(tmp_path, talk(image="huge.png")) == "image_too_large"


def test_the_pixel_limit_is_the_config_s(tmp_path):
    write(tmp_path, [talk()])
    sample = open_source(LlavaConfig("t", "data.json", max_pixels=23), root=str(tmp_path))[0]
    with pytest.raises(BadSample, match="6x4, limit 23 pixels"):
        sample.images[0]()


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_an_undecodable_file_is_corrupt(tmp_path, content):
    (tmp_path / "bad.png").write_bytes(content)
    assert reason_of(tmp_path, talk(image="bad.png")) == "corrupt_image"


def test_a_truncated_jpeg_is_corrupt(tmp_path):
    file = tmp_path / "cut.jpg"
    PilImage.effect_noise((64, 64), 50).convert("RGB").save(file)
    file.write_bytes(file.read_bytes()[:700])
    assert reason_of(tmp_path, talk(image="cut.jpg")) == "corrupt_image"


def test_transparency_shows_white(tmp_path):
    PilImage.new("RGBA", (3, 3), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read(tmp_path, talk(image="clear.png")).images[0]().getpixel((1, 1)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[1, 2", "not JSON: .* line 1 column"), ('{"a": 1}', "expected a list of records, found dict")],
)
def test_an_unusable_file_is_one_clear_line(tmp_path, text, message):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        open_source(LlavaConfig("t", "data.json"), root=str(tmp_path))
    assert "data.json" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file .*absent.json"):
        open_source(LlavaConfig("t", "absent.json"), root=str(tmp_path))


def test_image_paths_are_relative_to_root_of_the_source(tmp_path):
    (tmp_path / "pictures").mkdir()
    PilImage.new("RGB", (2, 2)).save(tmp_path / "pictures" / "b.png")
    write(tmp_path, [talk(image="b.png")])
    sample = open_source(LlavaConfig("t", "data.json", root="pictures"), root=str(tmp_path))[0]
    assert sample.images[0]().size == (2, 2)


def test_sources_describe_themselves(tmp_path):
    assert "1 records" in repr(open_source(write(tmp_path, [talk()]), root=str(tmp_path)))
    assert "seed=0" in repr(open_source(ScenesConfig("s")))


def picture():
    return PilImage.new("RGB", (2, 2))


def conversation(*questions: str) -> Sample:
    images = tuple(picture for _ in range(sum(q.count("<image>") for q in questions)))
    return Sample("s", tuple(Turn(q, "a") for q in questions), images)


def test_chosen_turns_are_opened_by_the_images():
    sample = conversation("<image>\none?", "two?", "three?").select([2, 0])
    assert [t.question for t in sample.turns] == ["<image>\nthree?", "one?"]
    behind = conversation("one?\n<image>", "two?")
    assert standalone_questions(behind) == ["<image>\none?", "<image>\ntwo?"]
    named = conversation("Image 1: <image> Image 2: <image>\none?", "two?")
    assert standalone_questions(named)[1] == "Image 1: <image> Image 2: <image>\ntwo?"


def test_cutting_a_conversation_drops_the_images_of_its_later_turns():
    sample = conversation("<image> one?", "<image> two?")
    assert len(sample.select([0]).images) == 1
    with pytest.raises(BadSample, match="image_in_later_turn"):
        sample.select([1])


def test_withheld_images_leave_no_placeholder():
    sample = conversation("<image>\n<image>\none?", "two?").without_images()
    assert [t.question for t in sample.turns] == ["one?", "two?"] and sample.images == ()


def test_a_reduced_jpeg_gives_nearly_the_same_tiles(tmp_path):
    gradient = PilImage.linear_gradient("L").resize((900, 500))
    PilImage.merge("RGB", [gradient, gradient.rotate(180), gradient]).save(tmp_path / "a.jpg", quality=95)
    gradient.save(tmp_path / "b.png")
    tiling = TilingConfig(tile_size=32, candidates=((1, 1), (2, 1)))
    config = DataConfig(max_tiles=3, tiling=tiling)
    whole, reduced = (
        make_encoder(dataclasses.replace(config, decoding=way), ModelSpec(2, "prefix", 2048))
        for way in ("whole", "reduced")
    )
    image = FileImage(tmp_path / "a.jpg", "here")
    assert image.at_least(64, 36).size == (113, 63) and image.size() == (900, 500)
    for name, most in (("a.jpg", 2.0), ("b.png", 0.0)):
        sample = Sample("s", (Turn("<image>", "a"),), (FileImage(tmp_path / name, "here"),))
        a, b = (encoder.example(sample) for encoder in (whole, reduced))
        assert a.grids == b.grids == ((2, 1),)
        assert np.abs(a.tiles.astype(int) - b.tiles.astype(int)).mean() <= most


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("https://x/a.png", "is an address, and nothing is fetched"),
        ("s3://x/a.png", "save the image as a file"),
        ("/etc/hostname", "leaves the image folder .*set root of the source"),
        ("../a.png", "name it relative to that folder"),
        ("b.png", "no image file .*b.png .names are relative"),
        ("a\ud83d.png", "bad path"),
    ],
)
def test_a_path_that_cannot_be_used_is_told_what_to_write(tmp_path, name, words):
    source = open_source(write(tmp_path, [talk(image=name)]), root=str(tmp_path))
    with pytest.raises(BadSample, match=words):
        source[0].images[0]()


def test_an_absolute_path_inside_the_folder_is_told_its_relative_one(tmp_path):
    source = open_source(write(tmp_path, [talk(image=str(tmp_path / "a.png"))]), root=str(tmp_path))
    with pytest.raises(BadSample, match="paths are relative: write 'a.png'"):
        source[0]


def test_a_folder_of_frames_that_is_no_name_spoils_only_its_record(tmp_path):
    source = open_source(write(tmp_path, [talk(frames="\0"), talk()]), root=str(tmp_path))
    with pytest.raises(BadSample, match="null byte"):
        source[0]
    assert source[1].images
