"""Clips as lists of frames: sampled evenly, marked one by one, read from inside the image folder only."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PilImage

from vl_jax.data.config import DataConfig, ModelSpec
from vl_jax.data.encode import make_encoder
from vl_jax.data.images.clips import evenly, mark_frames
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import BadSample
from vl_jax.data.sources.build import LlavaConfig, open_source
from vl_jax.data.sources.conversation import parse


@given(st.integers(1, 500), st.integers(1, 64))
def test_frames_are_taken_evenly(count, most):
    found = evenly(count, most)
    assert len(found) == min(count, most) and found == sorted(set(found))
    assert 0 <= found[0] <= found[-1] < count
    if most > 1:
        assert found[0] == 0 and found[-1] == count - 1
        steps = {b - a for a, b in zip(found, found[1:], strict=False)}
        assert not steps or max(steps) - min(steps) <= 1


def write(folder, *records, count=12) -> None:
    (folder / "clip").mkdir()
    for number in range(count):  # 2.png comes before 10.png
        PilImage.new("RGB", (8, 8), (number, 0, 0)).save(folder / "clip" / f"{number}.png")
    (folder / "clip" / "notes.txt").write_text("no frame")
    (folder / "d.json").write_text(json.dumps(records))


def test_a_folder_a_list_and_a_mark_give_the_same_frames(tmp_path):
    names = [f"clip/{n}.png" for n in range(12)]
    talk = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "It."}]
    asked = {"question": "What?", "answer": "It."}
    write(
        tmp_path,
        {"frames": "clip", **asked},
        {"frames": names, **asked},
        {"frames": "clip", "conversations": talk},
    )
    source = open_source(LlavaConfig("c", "d.json", max_frames=4), root=str(tmp_path))
    for index in range(3):
        sample = source[index]
        assert [image().getpixel((0, 0))[0] for image in sample.images] == [0, 4, 7, 11]
        assert sample.turns[0].question == "<image>\n" * 4 + "What?"
    config = DataConfig(tiling=TilingConfig(16, views="global"), max_tiles=4)
    example = make_encoder(config, ModelSpec(2, "prefix", 2048)).example(source[0])
    assert len(example.tiles) == 4


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(
    ("said", "question", "answer"),
    [
        ({"question": "<video>\nWhat?", "answer": "It."}, "{marks}\nWhat?", "It."),
        ({"question": "What is <video> for?", "answer": "It."}, "What is {marks} for?", "It."),
        ({"question": "<image>\nWhat?", "answer": "It."}, "{marks}\nWhat?", "It."),
        ({"question": "Which tag?", "answer": "<video>"}, "{marks}\nWhich tag?", "<video>"),
        ({"instruction": "<video> What?", "output": "It."}, "{marks} What?", "It."),
        ({"instruction": "What?", "input": "<video>", "output": "<image>"}, "What?\n{marks}", "<image>"),
        ({"instruction": "What?", "output": "It."}, "{marks}\nWhat?", "It."),
        ({"conversations": [{"from": "human", "value": "<video>What?"}, {"from": "gpt", "value": "<video>"}]},
         "{marks}What?", "<video>"),
    ],
)  # fmt: skip
def test_a_clip_is_marked_once_wherever_its_mark_stands(said, question, answer, count):
    names = [f"{n}.png" for n in range(count)]
    record = {"frames": "clip", "image": names, **said}
    (turn,) = parse(record, "d.json, record 0", default_id="0").turns
    assert turn.question == question.format(marks="\n".join(["<image>"] * count)) and turn.answer == answer


def test_a_clip_that_is_marked_before_is_not_marked_again():
    record = {"frames": "clip", "image": ["0.png", "1.png"], "instruction": "And now?", "output": "Out."}
    record["history"] = [["<video>\nWhat?", "It."]]
    first, second = parse(record, "d.json, record 0", default_id="0").turns
    assert (first.question, second.question) == ("<image>\n<image>\nWhat?", "And now?")


def test_a_video_mark_without_a_clip_is_text():
    record = {"image": "a.png", "question": "What does <video> mean?", "answer": "It."}
    (turn,) = parse(record, "d.json, record 0", default_id="0").turns
    assert turn.question == "<image>\nWhat does <video> mean?"


def test_a_video_that_nobody_decodes_is_no_text_without_pictures(tmp_path):
    talk = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "It."}]
    write(tmp_path, {"video": "a.mp4", "conversations": talk})
    with pytest.raises(BadSample, match="name the frames of a clip") as found:
        open_source(LlavaConfig("c", "d.json"), root=str(tmp_path))[0]
    assert found.value.reason == "unsupported_video"


def test_marks_that_are_there_for_every_frame_stay():
    said = [("user", "<image><image>What?"), ("assistant", "It.")]
    assert mark_frames(said, 2) == said


@pytest.mark.parametrize(
    ("frames", "reason"),
    [("none", "missing_image"), ("../x", "outside_root"), ([], "bad_image_field"), ([3], "bad_image_field"),
     ("/etc", "outside_root"), ({}, "bad_image_field"), ("clip/0.png", "missing_image")],
)  # fmt: skip
def test_bad_frames_have_a_reason(tmp_path, frames, reason):
    write(tmp_path, {"frames": frames, "question": "What?", "answer": "It."}, count=1)
    with pytest.raises(BadSample) as caught:
        open_source(LlavaConfig("c", "d.json"), root=str(tmp_path))[0]
    assert caught.value.reason == reason
    with pytest.raises(ValueError, match="max_frames=0 of source 'c'"):
        LlavaConfig("c", "d.json", max_frames=0)
