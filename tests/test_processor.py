"""The published processor: recorded cases exactly, and one truth for records and batches."""

from __future__ import annotations

import dataclasses
import json
import logging

import numpy as np
import pytest
import tokenizers
from oracle import processor_folder
from parity_processor import recorded_notes, run_notes
from PIL import Image as PilImage
from tokenizers import models

from vl_jax.data.config import ModelSpec
from vl_jax.data.encode import Encoder
from vl_jax.data.published.processor import Processor, ProcessorConfig
from vl_jax.data.published.request import Request
from vl_jax.data.sample import Sample, Turn
from vl_jax.data.text.tokenizer import (
    ASSISTANT,
    BOS,
    EOS,
    GROUNDING,
    IMAGE,
    PAD,
    USER,
    load_published_tokenizer,
    load_tokenizer,
)

# Ends a turn with a token that the published format does not know.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = ((8, 8), (8, 16), (16, 8), (16, 16))
PROCESSOR = Processor(load_tokenizer(), ProcessorConfig(SIZES, patch_size=2, downsample_ratio=2))


def picture(width: int = 20, height: int = 9) -> PilImage.Image:
    levels = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    return PilImage.fromarray(levels)


def talk(*contents: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def write_checkpoint(folder, *, processor: dict | None = None, model: dict | None = None):
    settings = {"candidate_resolutions": SIZES, "patch_size": 2, "downsample_ratio": 2}
    (folder / "processor_config.json").write_text(json.dumps(settings | (processor or {})))
    (folder / "tokenizer.json").write_text(load_tokenizer().plain.to_str())
    if model is not None:
        (folder / "config.json").write_text(json.dumps(model))
    return folder


def test_every_recorded_note_of_the_published_processor(oracles):
    folder = processor_folder(oracles)
    assert run_notes(folder) == recorded_notes(folder)


REQUESTS = [
    Request(talk("<image>\nWhat?", "red", "And <image> ?", "blue"), images=[picture()] * 2, inference=False),
    Request(talk("Hi", "yes"), inference=False),
    Request(talk("<image>What?", "red"), images=[picture(9, 20)], inference=False, mask_prompt=False),
    Request(prompt="A <image> of<image>", images=[picture()] * 2, inference=False),
    Request(prompt=" <image>What? ", images=[picture()], inference=False, wrap_prompt=True),
]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_batch_holds_the_tokens_labels_and_pixels_of_the_records(padding):
    batch = PROCESSOR.batch(REQUESTS, padding=padding)
    records = [PROCESSOR.record(r) for r in REQUESTS]
    padded = PROCESSOR.collate(records, padding=padding)
    np.testing.assert_array_equal(batch.tokens, padded.input_ids)
    np.testing.assert_array_equal(batch.segment_ids > 0, padded.attention_mask)
    np.testing.assert_array_equal(batch.modality > 0, padded.images_seq_mask)
    for row, record in enumerate(records):
        # The published loss compares position t with label t + 1. A label of BOS behind left padding
        # would teach to predict it from a pad, so the batch has none.
        weights, start = batch.loss_weights[row] > 0, int(np.argmax(padded.attention_mask[row]))
        targets = np.full(batch.tokens.shape[1], -100)
        targets[batch.target_index[row][weights]] = batch.targets[row][weights]
        count = len(record.labels)
        np.testing.assert_array_equal(targets[start : start + count - 1], record.labels[1:])
        assert weights.sum() == (record.labels[1:] != -100).sum()
        assert batch.positions[row, start : start + count].tolist() == list(range(count))
        if record.images_seq_mask.any():
            pixels = (batch.tiles[row, : len(record.images)].astype(np.float32) / 255 - 0.5) / 0.5
            np.testing.assert_allclose(pixels.transpose(0, 3, 1, 2), record.images, atol=1e-6)


def test_a_conversation_gives_the_batch_of_the_data_pipeline():
    sample = Sample("s", (Turn("<image>\nWhat?", "red"), Turn("Sure?", "")), (picture,), "Look.")
    tokenizer = PROCESSOR.tokenizer
    tiling, spec = PROCESSOR.config.tiling(), ModelSpec(2, "prefix", tokenizer.vocab_size)
    encoder = Encoder(tokenizer, tiling, spec, max_tokens=99, max_tiles=5, max_targets=1)
    expected = encoder.collate([[encoder.prompt(sample)]], pad_left=True)
    conversation = [
        {"role": "system", "content": " Look. "},
        *talk("<image>\nWhat?", "red", "Sure?", ""),
    ]
    found = PROCESSOR(conversations=conversation, images=[picture()], length=99, max_tiles=5)
    for field in dataclasses.fields(found):
        ours, theirs = getattr(found, field.name), getattr(expected, field.name)
        np.testing.assert_array_equal(ours, theirs, err_msg=field.name)


def test_several_conversations_end_together_and_text_alone_needs_no_picture():
    conversations = [talk("<image>What?", ""), talk("Hi", "")]
    batch = PROCESSOR(conversations=conversations, images=[[picture()], []])
    alone = PROCESSOR(conversations=talk("Hi", ""))
    count = alone.tokens.shape[1]
    np.testing.assert_array_equal(batch.tokens[1, -count:], alone.tokens[0])
    assert (batch.segment_ids[1, :-count] == 0).all() and (batch.segment_ids[:, -1] == 1).all()
    assert not (alone.visual_segment_ids > 0).any() and (alone.loss_weights == 0).all()
    trained = PROCESSOR(conversations=talk("Hi", "yes"), inference=False, length=count + 9)
    assert trained.segment_ids[0, 0] == 1 and trained.segment_ids[0, -1] == 0


def test_prompts_have_room_for_a_multiple_of_tiles_and_are_otherwise_the_batch():
    wide = picture(41, 9)
    requests = [
        Request(talk(f"<image>{text}", ""), images=[p]) for text, p in (("a", picture()), ("b?", wide))
    ]
    tight, roomy = PROCESSOR.batch(requests), PROCESSOR.prompts(requests)
    tiles = tight.tiles.shape[1]
    assert roomy.tiles.shape[1] == -(-tiles // 4) * 4 > tiles
    np.testing.assert_array_equal(roomy.tiles[:, :tiles], tight.tiles)
    assert not roomy.tiles[:, tiles:].any()
    for name in ("tokens", "positions", "visual_slot", "segment_ids"):
        np.testing.assert_array_equal(getattr(roomy, name), getattr(tight, name))


def test_pictures_come_from_the_messages_or_from_files(tmp_path):
    picture().save(tmp_path / "a.png")
    talks = [{**talk("<image>What?")[0], "images": [tmp_path / "a.png"]}, talk("", "")[1]]
    given = PROCESSOR(conversations=talk("<image>What?", ""), images=[picture()])
    np.testing.assert_array_equal(PROCESSOR(conversations=talks).tiles, given.tiles)


def test_marks_in_users_text_stay_text_but_a_raw_prompt_is_verbatim():
    user = PROCESSOR.tokenizer.user
    talked = PROCESSOR.record(Request(talk(f"say {USER}", "")))
    assert (talked.input_ids == user).sum() == 1
    raw = PROCESSOR.record(Request(prompt=f"{USER}: hi\n\n{ASSISTANT}:"))
    assert raw.input_ids.tolist() == PROCESSOR.record(Request(talk("hi", ""))).input_ids.tolist()


def test_a_system_prompt_is_shown_and_said_to_be_unread(caplog):
    with caplog.at_level(logging.WARNING):
        record = PROCESSOR.record(Request(talk("Hi", ""), system_prompt="Be kind."))
    assert record.sft_format == "Be kind.\n\nuser: Hi\n\nassistant:" and "system_prompt" in caplog.text
    assert record.input_ids.tolist() == PROCESSOR.record(Request(talk("Hi", ""))).input_ids.tolist()
    wrapped = PROCESSOR.record(Request(prompt="Hi", wrap_prompt=True, system_prompt="Be kind."))
    text = PROCESSOR.tokenizer.decode(wrapped.input_ids.tolist())
    assert text == f"{BOS}{wrapped.sft_format}" == f"{BOS}Be kind.\n\n{USER}: Hi\n\n{ASSISTANT}:"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(talk("<image><image>", ""), images=[picture()]), "2 <image> marks for 1 images"),
        (Request(talk("Hi", "yes")), "must be empty for inference"),
        (Request(talk("Hi")), "must end with an assistant's message"),
        (Request([{"role": "system", "content": "Look."}]), "must end with an assistant's message"),
        (Request([{"role": "tool", "content": ""}]), "unknown role 'tool'"),
        (Request([{"role": ["user"], "content": ""}]), "unknown role"),
        (Request(talk("Hi", "yes")[::-1]), "message 0 has role assistant, expected user"),
        (Request([{"role": "user"}]), "message 0 has no text"),
        (Request(talk("Hi", "a <image>"), inference=False), "<image> in an answer"),
        (Request([{"role": "system", "content": "<image>"}, *talk("a", "")]), "<image> in the system text"),
        (Request(talk("Hi", ""), prompt="Hi"), "either messages or a prompt"),
        (Request(), "either messages or a prompt"),
        (Request(talk("Hi " * 99, "")), r"tokens \(0 of them visual\), the context has 64"),
        (Request(talk("<image>", ""), images=["none.png"]), "no image file none.png"),
    ],
)
def test_a_broken_request_is_named_in_one_line(request_, message):
    processor = dataclasses.replace(PROCESSOR, max_tokens=64)
    with pytest.raises(ValueError, match=message) as error:
        processor.batch([Request(talk("Hi", "")), request_])
    assert "\n" not in str(error.value) and "conversation 1" in str(error.value)
    with pytest.raises(ValueError, match=message):
        processor.record(request_)


def test_static_sizes_that_are_too_small_are_named():
    request = Request(talk("<image>", ""), images=[picture()])
    for name in ("length", "max_tiles"):
        with pytest.raises(ValueError, match=f"{name}=1"):
            PROCESSOR.batch([request], **{name: 1})
    with pytest.raises(ValueError, match="2 lists for 1 conversations"):
        PROCESSOR(conversations=[talk("Hi", "")], images=[[], []])


def test_a_checkpoint_folder_with_published_defaults(tmp_path):
    write_checkpoint(tmp_path, processor={"image_std": None, "processor_class": "DeepseekVLV2Processor"})
    found = Processor.load(tmp_path)
    assert found.config == PROCESSOR.config
    assert (found.views, found.max_tokens, found.config.mask_prompt) == ("global_local", 4096, True)
    assert found.tokenizer.vocab_size == PROCESSOR.tokenizer.vocab_size
    model = {"global_view_pos": "tail", "language_config": {"max_position_embeddings": 77}}
    found = Processor.load(write_checkpoint(tmp_path, processor={"image_mean": [0.1, 0.2, 0.3]}, model=model))
    assert (found.views, found.max_tokens) == ("local_global", 77)
    assert found.config.tiling().padding_colour == (25, 51, 76)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": None}, "lacks patch_size"),
        ({"candidate_resolutions": []}, "lacks candidate_resolutions"),
        ({"candidate_resolutions": [[8, 8], [12, 8]]}, "multiples of the tile"),
        ({"sft_format": "plain"}, "sft_format='plain'"),
        ({"image_token": "<img>"}, "image_token='<img>'"),
        ({"downsample_ratio": 0}, "downsample_ratio=0"),
    ],
)
def test_a_bad_processor_config_is_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        Processor.load(write_checkpoint(tmp_path, processor=settings))


def test_a_folder_without_files_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such file .*processor_config.json"):
        Processor.load(tmp_path)
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        Processor.load(tmp_path)
    with pytest.raises(ValueError, match="no such file .*tokenizer.json"):
        load_published_tokenizer(tmp_path)


def test_marks_a_published_tokenizer_lacks_get_the_next_ids(tmp_path):
    bare = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    bare.add_special_tokens([BOS, EOS])
    (tmp_path / "tokenizer.json").write_text(bare.to_str())
    found = load_published_tokenizer(tmp_path)
    marks = [PAD, IMAGE, *GROUNDING, USER, ASSISTANT]
    assert [found.token_id(mark) for mark in marks] == list(range(4, 4 + len(marks)))
    # A config that names its own padding token makes room for none.
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": EOS}}))
    found = load_published_tokenizer(tmp_path)
    assert (found.pad, found.image) == (3, 4)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    with pytest.raises(ValueError, match="bos_token='<s>'"):
        load_published_tokenizer(tmp_path)


def test_a_chat_template_of_the_folder_is_used_and_its_tokens_are_tokens(tmp_path):
    folder = write_checkpoint(tmp_path, processor={"chat_template": TEMPLATE})
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.add_special_tokens(["<|user|>", "<|assistant|>", "<|im_end|>"])
    plain.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": BOS, "eos_token": EOS}))
    processor = Processor.load(folder)
    ids = {token: plain.token_to_id(token) for token in (BOS, "<|user|>", "<|assistant|>", "<|im_end|>")}
    assert ids["<|im_end|>"] in processor.stops.tokens
    found = processor(conversations=talk("<image>\nWhat?", ""), images=[picture()]).tokens[0].tolist()
    visual = processor.tokenizer.image
    text = [token for token in found if token != visual]
    assert visual in found and text[:2] == [ids[BOS], ids["<|user|>"]]
    assert text[-2:] == [ids["<|im_end|>"], ids["<|assistant|>"]]
    assert processor.tokenizer.decode(text[2:-2]).strip() == "What?"
