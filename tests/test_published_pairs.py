"""Published image-text pairs: read as joint models, trained on, published again; and what they cannot do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
import tokenizers
from PIL import Image
from tokenizers import models, normalizers, pre_tokenizers, processors

import vl_jax
from vl_jax import ask, runs
from vl_jax import params as params_lib
from vl_jax.cli import main
from vl_jax.data.config import DataConfig
from vl_jax.data.encode import make_encoder
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import Sample, Turn
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.encoders.text import TextEncoderConfig
from vl_jax.encoders.vit import ViTConfig
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.tasks.retrieval import Retrieval
from vl_jax.experiment import Experiment, model_spec, plan, resolve
from vl_jax.heads.pairs import Pairs
from vl_jax.interop import pretrained, rules, vision
from vl_jax.interop.folder import open_weights, write_folder
from vl_jax.interop.safetensors import Entry
from vl_jax.joint import JointConfig, Tower
from vl_jax.layout import abstract
from vl_jax.schema import from_json, to_json
from vl_jax.train.loop import LoopConfig
from vl_jax.train.objectives.contrastive import ContrastivePairs
from vl_jax.train.optimizer import OptimizerConfig
from vl_jax.train.stages import Stage

pytest.importorskip("ml_collections")  # experiment files return its ConfigDict
pytest.importorskip("grain")

FILE = Path(__file__).resolve().parent.parent / "experiments" / "contrastive.py"
COLOURS = ("red", "green", "blue", "white")
START, END = "<|startoftext|>", "<|endoftext|>"
SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
PICTURE = {**SIZES, "image_size": 8, "patch_size": 4}
TEXT = {**SIZES, "vocab_size": 9, "max_position_embeddings": 6}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {"text_config": {**TEXT, "eos_token_id": 8}, "vision_config": PICTURE, "projection_dim": 5},
    "siglip": {"text_config": {**TEXT, "projection_size": 12}, "vision_config": PICTURE},
}
PICTURES: dict[str, dict[str, Any]] = {
    # As the first CLIP checkpoints say it, and as all do now.
    "clip": {"feature_extractor_type": "CLIPFeatureExtractor", "size": 8, "crop_size": 8},
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 8, "width": 8}},
}
SIDE = 8  # pixels


def write_tokenizer(folder: Path, kind: str) -> None:
    """Words in lower case; around a text stand both marks (CLIP), or the end alone (SigLIP)."""
    vocabulary = {word: i for i, word in enumerate(("?", "a", "thing", *COLOURS, START, END))}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.normalizer, made.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    made.add_special_tokens([START, END])
    before = f"{START} " if kind == "clip" else ""
    marks = [(mark, vocabulary[mark]) for mark in (START, END)]
    made.post_processor = processors.TemplateProcessing(single=f"{before}$A {END}", special_tokens=marks)
    made.save(str(folder / "tokenizer.json"))
    named = {"bos_token": {"content": START} if kind == "clip" else None, "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))


def write_checkpoint(folder: Path, kind: str) -> Path:
    """A checkpoint of random weights, with its tokenizer and image processor."""
    fields = {"model_type": kind, **CONFIGS[kind]}
    shapes = {
        path: tuple(leaf.shape)
        for path, leaf in params_lib.flatten(abstract(vision.read_contrastive(fields))).items()
    }
    numbers, arrays = np.random.default_rng(0), {}
    for leaf in rules.plan(vision.contrastive_rules(kind), shapes).leaves:
        for _, key in leaf.sources():
            values = 0.3 * numbers.normal(size=leaf.source_shape) + key.endswith("norm1.weight")
            arrays[key] = np.asarray(values, np.float32)
    entries = {key: Entry(value.shape, value.dtype) for key, value in arrays.items()}
    write_folder(folder, fields, entries, arrays.items())
    write_tokenizer(folder, kind)
    (folder / "preprocessor_config.json").write_text(json.dumps(PICTURES[kind]))
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    return {kind: write_checkpoint(folder / kind, kind) for kind in CONFIGS}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Four pictures of one colour, and its name."""
    folder, records = tmp_path_factory.mktemp("data"), []
    for colour in COLOURS:
        Image.new("RGB", (12, 10), colour).save(folder / f"{colour}.png")
        turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": f"A {colour} thing"}]
        records.append({"id": colour, "image": f"{colour}.png", "conversations": turns})
    for name in ("all", "train", "val"):
        (folder / f"{name}.json").write_text(json.dumps(records))
    return folder


def experiment(folder: Path, data: Path, **changes: Any) -> Experiment:
    source = LlavaConfig("all", "all.json", caption=True)
    form = "sigmoid" if folder.name == "siglip" else "softmax"
    rate = OptimizerConfig(learning_rate=1e-2, warmup_steps=0)
    fields: dict[str, Any] = {
        "name": "pairs",
        "init": str(folder),
        "model": ours(),
        "data": DataConfig(root=str(data), sources=(source,), evaluation=(source,), max_tokens=6),
        "stages": (
            Stage("pairs", steps=1, batch_size=4, objective=ContrastivePairs(loss=form), optimizer=rate),
        ),
        "loop": LoopConfig(checkpoint_every=100),
        "evaluation": EvaluationConfig(task=Retrieval(), batch_size=4),
    }
    return Experiment(**{**fields, **changes})


def ours(**changes: Any) -> JointConfig:
    """The names of the parts, and what is no property of a published model."""
    fields: dict[str, Any] = {
        "towers": (Tower("image", ViTConfig()), Tower("text", TextEncoderConfig(), "tokens")),
        "heads": (Pairs(identity="colour"),),
        "remat": True,
        **changes,
    }
    return JointConfig(**fields)


@pytest.mark.parametrize(("kind", "fit"), [("clip", "crop"), ("siglip", "stretch")])
@pytest.mark.slow
def test_the_model_is_the_published_one_but_for_how_it_runs_and_its_labels(published, data, kind, fit):
    given = experiment(published[kind], data)
    found, expected = resolve(given), pretrained.read_published(published[kind]).config
    assert isinstance(found.model, JointConfig) and isinstance(expected, JointConfig)
    assert found.model.towers == expected.towers and found.model.remat and not expected.remat
    (pairs,) = expected.heads
    assert isinstance(pairs, Pairs) and pairs.dim is None
    assert found.model.heads == (dataclasses.replace(pairs, identity="colour"),)
    assert found.data.tokenizer == str(published[kind])
    assert found.data.tiling == TilingConfig(SIDE, views="global", fit=fit)
    assert resolve(found) == found and from_json(to_json(found), Experiment) == found


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        ("clip", {"A RED thing": [7, 1, 3, 2, 8, 8], "a a a a a a": [7, 1, 1, 1, 1, 8]}),
        ("siglip", {"A RED thing": [1, 3, 2, 8, 8, 8], "a a a a a a": [1, 1, 1, 1, 1, 8]}),
    ],
)
def test_a_text_is_what_the_published_tokenizer_makes_of_it(published, data, kind, texts):
    """Start and end stand where the checkpoint has them; a text is cut before its end; padding follows."""
    given = resolve(experiment(published[kind], data))
    encoder = make_encoder(given.data, model_spec(given))
    for text, ids in texts.items():
        example = encoder.example(Sample("s", (Turn("", text, "text"),)))
        batch = encoder.collate([[example]])
        assert batch.tokens[0].tolist() == ids
    # What looks like a special token is spelt out, here as unknown words.
    example = encoder.example(Sample("s", (Turn("", END, "text"),)))
    assert example.tokens.tolist().count(8) == 1


def test_the_tokenizer_of_such_a_checkpoint_holds_no_dialogue(published):
    spec = dataclasses.replace(tiny.config().spec(), reads="dialogue", labels=(), media=())
    with pytest.raises(ValueError, match=r"bos_token='<\|startoftext\|>': must be"):
        make_encoder(DataConfig(tokenizer=str(published["clip"])), spec)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CONFIGS)
def test_training_begins_with_the_published_weights_and_publishes_what_it_made_of_them(
    published, data, tmp_path, monkeypatch, capsys, kind
):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    given = experiment(published[kind], data, model=ours(heads=(Pairs(),)))
    results = runs.run(given, tmp_path / "run")
    assert results["all"]["scores"]["count"] == 4
    resolved, layout, state, _ = runs.restore(tmp_path / "run")
    before, routing = pretrained.load_params(published[kind], layout)
    assert resolved == resolve(given) and routing == {}
    weights = open_weights(published[kind])
    scale = float(np.asarray(weights["logit_scale"]).item())
    assert float(before["pairs"]["scale"]) == scale
    before, after = params_lib.flatten(before), params_lib.flatten(state.params)
    assert before.keys() == after.keys()
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert moved >= {"pairs/scale", "image/stem/kernel", "text/embedding", "text/projection/kernel"}
    assert main(["convert", f"--from={tmp_path / 'run'}", f"--to={tmp_path / 'out'}"]) == 0
    again, _ = pretrained.load_params(tmp_path / "out", layout)
    for path, leaf in params_lib.flatten(again).items():
        np.testing.assert_array_equal(leaf, after[path], err_msg=path)
    assert set(open_weights(tmp_path / "out")) == set(weights)
    capsys.readouterr()
    assert main(["generate", f"--workdir={tmp_path / 'run'}", "--prompt=What?"]) == 2
    assert "is a JointConfig, which writes no text" in capsys.readouterr().err
    found = runs.evaluate_published(
        dataclasses.replace(given, init=str(tmp_path / "out")), ["all"], tmp_path / "again"
    )
    assert found["all"]["scores"] == results["all"]["scores"]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.slow
def test_what_is_converted_there_and_back_is_the_same(published, tmp_path, kind):
    assert main(["convert", f"--from={published[kind]}", f"--to={tmp_path / 'ours'}"]) == 0
    assert main(["convert", f"--from={tmp_path / 'ours'}", f"--to={tmp_path / 'back'}"]) == 0
    before, after = open_weights(published[kind]), open_weights(tmp_path / "back")
    assert set(before) == set(after)
    for key in before:
        assert before[key].shape == after[key].shape and before[key].tobytes() == after[key].tobytes(), key
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_another_model_is_refused_in_one_line(published, data, oracles):
    def message(folder: Path, model: Any) -> str:
        with pytest.raises(ValueError) as error:
            resolve(experiment(folder, data, model=model))
        assert "\n" not in str(error.value)
        return str(error.value)

    image, text = ours().towers
    renamed = dataclasses.replace(image, name="picture")
    found = message(published["clip"], ours(towers=(renamed, text), heads=(Pairs(image="picture"),)))
    assert found.startswith("config.model.towers: has [('picture', 'tiles'), ('text', 'tokens')], the checkp")
    found = message(published["clip"], ours(heads=(Pairs(name="match"),)))
    assert found.startswith("config.model.heads: has [('match', 'Pairs')]")
    found = message(published["clip"], tiny.config())
    assert found == "config.init: a published JointConfig cannot begin a VisionLanguageConfig"
    found = message(oracles / "hf" / "mixtral", ours())
    assert found == "config.init: a published VisionLanguageConfig cannot begin a JointConfig"


def test_rows_of_siglip_have_its_length(published, data):
    given = experiment(published["siglip"], data)
    short = dataclasses.replace(given, data=dataclasses.replace(given.data, max_tokens=5))
    with pytest.raises(ValueError, match="max_tokens=5 differs from the 6 of model.towers.text.encoder"):
        resolve(short)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_mean": [0.5, 0.5, 0.5]}, r"image_mean=\(0.5, 0.5, 0.5\): must be \(0.48"),
        ({"crop_size": 6}, "no tiles are made so, set data.tiling"),
        ({"resample": 2}, "no tiles are made so, set data.tiling"),
    ],
)
def test_pictures_that_tiles_cannot_be_are_named(published, data, tmp_path, changes, message):
    folder = write_checkpoint(tmp_path / "clip", "clip")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**PICTURES["clip"], **changes}))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: .*{message}"):
        resolve(experiment(folder, data))
    # A tiling of one's own is taken as it is; without the file, there is none to take.
    given, own = experiment(folder, data), TilingConfig(SIDE, views="global")
    changed = dataclasses.replace(given, data=dataclasses.replace(given.data, tiling=own))
    assert resolve(changed).data.tiling == own
    file.unlink()
    with pytest.raises(ValueError, match="data.tiling.tile_size=384 differs from the 8x8 pixels"):
        resolve(given)


def test_a_pair_writes_no_text(published, capsys):
    for load in (vl_jax.from_pretrained, ask.load):
        with pytest.raises(ValueError, match="its model is a JointConfig, which writes no text"):
            load(published["clip"])
    assert main(["generate", f"--model={published['clip']}", "--prompt=What?"]) == 2
    said = capsys.readouterr().err
    assert "which writes no text; `evaluate` says what it can" in said and said.count("\n") == 1


def test_the_plan_of_a_run_shows_the_parameters_of_the_checkpoint(published, data, monkeypatch):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    layout = plan(resolve(experiment(published["siglip"], data)))
    paths = set(params_lib.flatten(layout.params))
    assert {"pairs/scale", "pairs/bias", "image/pooler/probe", "text/projection/bias"} <= paths
    assert not {path for path in paths if path.startswith(("pairs/image", "pairs/text"))}


@pytest.mark.slow
def test_the_experiment_of_published_pairs_evaluates_a_folder_as_it_is(
    published, data, tmp_path, monkeypatch, capsys
):
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: one)
    settings = {"data.root": str(data), "data.max_tokens": 6, "evaluation.batch_size": 4}
    arguments = [
        f"--model={published['clip']}",
        f"--config={FILE}:published",
        f"--workdir={tmp_path / 'out'}",
        *(f"--config.{path}={value}" for path, value in settings.items()),
    ]
    assert main(["evaluate", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["val"]["scores"]["count"] == 4
