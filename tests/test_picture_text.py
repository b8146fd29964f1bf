"""Processors whose pictures are runs of marks: texts, tokens, pixels, and whole published folders asked."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tokenizers
from PIL import Image as PilImage
from tokenizers import models, pre_tokenizers

import vl_jax
from vl_jax import sharding
from vl_jax.data.images.pixels import read_image_processor
from vl_jax.data.published.picture_text import PictureTextProcessor, make_row, stacked
from vl_jax.data.published.request import Request, to_sample
from vl_jax.interop.vision_language import FAMILIES, load_processor, read_vision_language
from vl_jax.layout import put_batch
from vl_jax.sharding import MeshConfig, make_mesh

SIDES = {"size": 32}
SETTINGS = {
    "deepseek_vl": {"image_processor_type": "DeepseekVLImageProcessor", **SIDES},
    "deepseek_vl_hybrid": {"image_processor_type": "DeepseekVLHybridImageProcessor", **SIDES},
    "llava": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 32}, "crop_size": 32},
    "llava_multilayer": {"image_processor_type": "CLIPImageProcessor", "size": [32, 32], "crop_size": 32},
}
MARK, END = "<mark>", "<end>"
RED = PilImage.new("RGB", (50, 20), "red")


def write_folder(oracles: Path, folder: Path, name: str) -> dict[str, Any]:
    """A recorded model with a processor and a vocabulary: token i is "ti", but for a few."""
    shutil.copytree(oracles / "hf" / name, folder)
    config = json.loads((folder / "config.json").read_text())
    image = config.get("image_token_id", config.get("image_token_index"))
    words = {image: MARK, 95: END, 94: "?"}
    vocabulary = {words.get(i, f"t{i}"): i for i in range(96)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in (MARK, END)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": END}}))
    settings = dict(SETTINGS[name])
    if name == "deepseek_vl_hybrid":
        settings["high_res_size"] = config["high_res_vision_config"]["image_size"]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return config


@pytest.fixture(params=SETTINGS)
def published(request, oracles: Path, tmp_path: Path) -> tuple[Path, dict[str, Any], PictureTextProcessor]:
    folder = tmp_path / "model"
    config = write_folder(oracles, folder, request.param)
    processor = load_processor(folder, config, read_vision_language(config))
    assert processor is not None
    return folder, config, processor


def recorded_prompt(tokens: np.ndarray, mark: int, length: int) -> tuple[str, int]:
    """The text of recorded ids, and how many pictures are marked in it."""
    text = " ".join("<image>" if t == mark else f"t{t}" for t in tokens)
    run = " ".join(["<image>"] * length)
    return text.replace(run, "<image>"), text.count("<image>") // length


def test_a_recorded_sequence_comes_back_token_by_token(published):
    folder, config, processor = published
    recorded = np.load(folder / "io.npz")
    for tokens, valid in zip(recorded["in_input_ids"], recorded["in_attention_mask"], strict=True):
        tokens = tokens[valid > 0]
        prompt, count = recorded_prompt(tokens, processor.image_token, processor.image_tokens)
        batch = processor(prompt=prompt, images=[RED] * count)
        np.testing.assert_array_equal(batch.tokens[0], tokens)
        visual = tokens == processor.image_token
        np.testing.assert_array_equal(batch.visual_slot[0] >= 0, visual)
        if count:
            np.testing.assert_array_equal(batch.visual_slot[0][visual], np.arange(visual.sum()))
            np.testing.assert_array_equal(batch.visual_index[0], np.arange(visual.sum()))
        made = read_image_processor(json.loads((folder / "preprocessor_config.json").read_text()))(RED)
        for tiles, name in ((batch.tiles, "pixel_values"), (batch.high_tiles, "high_res_pixel_values")):
            assert (tiles is None) == (name not in made)
            for tile in tiles[0, :count] if tiles is not None else ():
                np.testing.assert_array_equal(tile, made[name])


def test_a_conversation_is_written_as_the_model_was_taught():
    talk = [
        {"role": "user", "content": "<image>\nWhat? "},
        {"role": "assistant", "content": " A cat."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": ""},
    ]
    sample = to_sample(Request(talk, images=[RED]), name="it")
    texts = {n: FAMILIES[n].chat.text(sample, eos="</s>", inference=True) for n in ("llava", "deepseek_vl")}
    assert texts["llava"] == "USER: <image>\nWhat? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    system, _, rest = texts["deepseek_vl"].partition("\n\n")
    assert system.startswith("You are a helpful language and vision assistant. You")
    assert rest == "User: <image>\nWhat?\n\nAssistant: A cat.</s>User: Sure?\n\nAssistant:"
    told = dataclasses.replace(sample, system="Be brief.")
    assert FAMILIES["llava"].chat.text(told, eos="</s>", inference=True).startswith("Be brief. USER: <image>")


def test_what_does_not_fit_is_named_in_one_line(oracles, tmp_path):
    config = write_folder(oracles, tmp_path / "model", "llava")
    model = read_vision_language(config)
    processor = load_processor(tmp_path / "model", config, model)
    assert processor is not None
    ask = {"role": "user", "content": "<image> t1"}
    for conversation, images, message in (
        ([ask, {"role": "assistant", "content": ""}], [], "1 <image> marks for 0 images"),
        ([{**ask, "content": MARK}, {"role": "assistant", "content": ""}], [], "1 tokens"),
        ([{**ask, "content": "t1 " * 5000}, {"role": "assistant", "content": ""}], [], "the context has"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            processor(conversations=conversation, images=images)
        assert "\n" not in str(error.value)
    settings = {**SETTINGS["llava"], "crop_size": 24}
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(settings))
    small = load_processor(tmp_path / "model", config, model)
    with pytest.raises(ValueError, match=r"makes \(24, 24, 3\), the model takes \(32, 32, 3\)"):
        small(prompt="<image>", images=[RED])  # type: ignore[misc]
    (tmp_path / "model" / "preprocessor_config.json").write_text(json.dumps(SETTINGS["deepseek_vl_hybrid"]))
    with pytest.raises(ValueError, match="the model takes"):
        load_processor(tmp_path / "model", config, model)


@pytest.mark.slow
def test_a_published_folder_answers_about_a_picture(published):
    folder, _, processor = published
    model = vl_jax.from_pretrained(folder, mesh=make_mesh(MeshConfig(1), devices=jax.devices()[:1]))
    talk = [{"role": "user", "content": "<image> t1 t2", "images": [RED]}]
    assert model.generate(talk, max_new_tokens=5)
    # The recorded logits, from a batch of the processor that shows the recorded pictures.
    recorded = np.load(folder / "io.npz")
    valid = recorded["in_attention_mask"][0] > 0
    tokens = recorded["in_input_ids"][0][valid]
    prompt, count = recorded_prompt(tokens, processor.image_token, processor.image_tokens)
    batch = processor(prompt=prompt, images=[RED] * count)
    pixels = {"tiles": "in_pixel_values", "high_tiles": "in_high_res_pixel_values"}
    shown = {
        ours: np.moveaxis(recorded[name][:count], 1, -1)[None]
        for ours, name in pixels.items()
        if name in recorded
    }
    batch = put_batch(dataclasses.replace(batch, **shown), model.layout)
    run = jax.jit(functools.partial(model.model.apply, method="initialize"))  # which gives the logits
    with jax.default_matmul_precision("highest"), sharding.use_mesh(model.layout.mesh, model.layout.rules):
        logits: Any = run({"params": model.params}, batch, model.routing_state)
    np.testing.assert_allclose(logits[0], recorded["out_logits"][0][valid], atol=1e-4)


TEMPLATE = (
    "{% for m in messages %} t1 {% for p in m.content %}{{ ' <image> ' if p.type == 'image' else p.text }}"
    "{% endfor %} <end> {% endfor %}{% if add_generation_prompt %} t2 {% endif %}"
)


def test_a_folder_with_a_chat_template_is_asked_by_it(published):
    folder, config, processor = published
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    own = load_processor(folder, config, read_vision_language(config))
    assert own is not None and own.stops.tokens[-1] == 95  # its end of a turn
    talk = [
        {"role": "user", "content": "<image>\nt3"},
        {"role": "assistant", "content": "t4"},
        {"role": "user", "content": "t5"},
        {"role": "assistant", "content": ""},
    ]
    marks = [own.image_token] * own.image_tokens
    asked = own(conversations=talk, images=[RED]).tokens[0].tolist()
    assert asked == [1, *marks, 3, 95, 1, 4, 95, 1, 5, 95, 2]
    whole = own(conversations=talk, images=[RED], inference=False).tokens[0].tolist()
    assert whole == [*asked[:-1], 1, 95]
    assert processor.template is None


def test_a_picture_may_be_written_as_the_mark_of_the_checkpoint(published):
    folder, config, _ = published
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("<image>", MARK))
    own = load_processor(folder, config, read_vision_language(config))
    assert own is not None
    talk = [{"role": "user", "content": "<image>\nt3"}, {"role": "assistant", "content": ""}]
    asked = own(conversations=talk, images=[RED]).tokens[0].tolist()
    assert asked == [1, *[own.image_token] * own.image_tokens, 3, 95, 2]


def test_several_conversations_are_the_rows_of_each(published):
    _, _, processor = published
    requests = [
        Request(
            ({"role": "user", "content": f"<image> {text}"}, {"role": "assistant", "content": ""}), images=[p]
        )
        for text, p in (("t1 t2 t3", RED), ("t4", RED.rotate(90)))
    ]
    batch = processor.prompts(requests)
    length = batch.tokens.shape[1]
    for row, request in enumerate(requests):
        alone = processor(conversations=request.conversation, images=request.images)
        more = length - alone.tokens.shape[1]
        assert row or not more
        for name in ("tokens", "positions", "segment_ids", "visual_slot"):
            np.testing.assert_array_equal(getattr(batch, name)[row, more:], getattr(alone, name)[0])
        assert not batch.segment_ids[row, :more].any() and (batch.visual_slot[row, :more] == -1).all()
        np.testing.assert_array_equal(batch.visual_start[row], alone.visual_start[0] + more)
        np.testing.assert_array_equal(batch.tiles[row], alone.tiles[0])


def test_prompts_of_one_row_each_become_a_batch():
    def row(length: int, pictures: int) -> Any:
        tokens = np.arange(1, length + 1, dtype=np.int32)
        low = np.full((1, max(pictures, 1), 2, 2, 3), float(pictures), np.float32)
        return make_row(tokens, np.arange(length) < 2 * pictures, low, None)

    batch = stacked([row(3, 0), row(6, 2)])
    assert batch.tokens.tolist() == [[0, 0, 0, 1, 2, 3], [1, 2, 3, 4, 5, 6]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 1, 1, 1], [1] * 6]
    assert batch.visual_slot.tolist() == [[-1] * 6, [0, 1, 2, 3, -1, -1]]
    assert batch.visual_index.tolist() == [[-1] * 4, [0, 1, 2, 3]]
    assert batch.tiles.shape == (2, 2, 2, 2, 3) and batch.tiles[0].sum() == 0 and batch.high_tiles is None
