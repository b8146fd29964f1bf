"""What is found wrong with records, what is guessable, and the page that shows it."""

from __future__ import annotations

import dataclasses
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vl_jax.data.config import DataConfig, ModelSpec, PackingConfig, open_sources
from vl_jax.data.encode import make_encoder
from vl_jax.data.images.augment import AugmentationConfig
from vl_jax.data.images.spatial import Boxes, HeldMasks, Instances
from vl_jax.data.images.tiling import TilingConfig
from vl_jax.data.sample import Box, Sample, Turn
from vl_jax.data.sources.coco import CocoConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.data.sources.parquet import ParquetConfig
from vl_jax.data.sources.scenes import ScenesConfig
from vl_jax.data.sources.webdataset import WebDatasetConfig
from vl_jax.data.stream.readers import Place, SampleReader
from vl_jax.data.tools import examination as examination_lib
from vl_jax.data.tools import objects, preview
from vl_jax.heads.classification import Classification
from vl_jax.heads.detection import Detection
from vl_jax.report import data as data_page

SPEC = ModelSpec(tile_tokens_side=2, fusion="prefix", vocab_size=2048)
CONFIG = DataConfig(
    sources=(ScenesConfig("scenes", num_examples=50),),
    max_tokens=200,
    tiling=TilingConfig(tile_size=32, views="global"),
)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (16, 24, 3), np.uint8))


def sample(identity: str, *turns: Turn, seed: int = 0) -> Sample:
    first = dataclasses.replace(turns[0], question=f"<image>\n{turns[0].question}")
    return Sample(identity, (first, *turns[1:]), images=(lambda: picture(seed),))


def examine(monkeypatch, samples: list[Sample], **options) -> examination_lib.Examination:
    monkeypatch.setattr(examination_lib, "opened", lambda config, source: samples)
    return examination_lib.examine(CONFIG, SPEC, "scenes", **options)


def found(examination: examination_lib.Examination) -> dict[str, int]:
    return {f.what: f.count for f in examination.findings}


def test_files_tell_what_is_wrong_with_them(tmp_path):
    picture(0).save(tmp_path / "a.png")
    picture(0).save(tmp_path / "again.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    question = {"from": "human", "value": "<image>\nwhat?"}
    conversation = [question, {"from": "gpt", "value": "this"}]
    records = [
        {"id": name, "image": f"{name}.png", "conversations": conversation} for name in ("a", "cut", "no")
    ]
    records += [
        {"id": "again", "image": "again.png", "conversations": conversation},
        {"id": "a", "image": "a.png", "conversations": conversation},
        {"id": "bare", "conversations": conversation},
        7,
    ]
    (tmp_path / "train.json").write_text(json.dumps(records), encoding="utf-8")
    config = dataclasses.replace(CONFIG, root=str(tmp_path), sources=(LlavaConfig("files", "train.json"),))
    examination = examination_lib.examine(config, SPEC, "files")
    assert found(examination) == {
        "cannot be used: missing image": 1,
        "cannot be used: corrupt image": 1,
        "cannot be used: placeholder mismatch": 1,
        "cannot be used: not an object": 1,
        examination_lib.REPEATED_PICTURE: 1,
        "id that an earlier record has": 1,
    }
    assert examination.num_usable == 3 and examination.num_records == examination.num_examined == 7
    examples = {f.what: f.examples for f in examination.findings}
    assert "no.png" in examples["cannot be used: missing image"][0]
    assert examples[examination_lib.REPEATED_PICTURE] == ("again and a",)


def as_files(folder: Path, records: list[tuple[dict, bytes]]) -> LlavaConfig:
    for number, (_, data) in enumerate(records):
        (folder / f"{number}.png").write_bytes(data)
    texts = [json.dumps({**record, "image": f"{n}.png"}) for n, (record, _) in enumerate(records)]
    (folder / "d.jsonl").write_text("\n".join(texts))
    return LlavaConfig("s", "d.jsonl")


def as_tar(folder: Path, records: list[tuple[dict, bytes]]) -> WebDatasetConfig:
    with tarfile.open(folder / "d.tar", "w") as out:
        for number, (record, image) in enumerate(records):
            for ending, data in (("png", image), ("json", json.dumps(record).encode())):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
    return WebDatasetConfig("s", "d.tar")


def as_parquet(folder: Path, records: list[tuple[dict, bytes]]) -> ParquetConfig:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{**record, "image": {"bytes": data}} for record, data in records]
    pq.write_table(pa.Table.from_pylist(rows), folder / "d.parquet")
    return ParquetConfig("s", "d.parquet")


@pytest.mark.parametrize("write", [as_files, as_tar, as_parquet])
def test_every_container_tells_of_the_same_faults(tmp_path, write):
    def png(seed: int) -> bytes:
        out = io.BytesIO()
        picture(seed).save(out, "PNG")
        return out.getvalue()

    def record(name: str, answer: str | None = "that", question: str = "what?") -> dict:
        return {"id": name, "question": question, "answer": answer}

    records = [(record(str(n)), png(n)) for n in range(4)]
    records += [(record("again"), png(0)), (record("2"), png(9)), (record("e", ""), png(10))]
    records += [(record("cut"), png(11)[:60]), (record("n", None), png(12))]
    records += [(record("more", question="<image><image>"), png(13))] * 2
    config = dataclasses.replace(CONFIG, root=str(tmp_path), sources=(write(tmp_path, records),))
    examination = examination_lib.examine(config, SPEC, "s")
    assert found(examination) == {
        examination_lib.REPEATED_PICTURE: 1,
        "id that an earlier record has": 1,
        "empty answer": 1,
        "cannot be used: corrupt image": 1,
        "cannot be used: bad conversation": 1,
        "cannot be used: placeholder mismatch": 2,
    }
    assert examination.num_usable == 7 and examination.num_records == examination.num_examined == 11


@pytest.mark.parametrize(
    ("corners", "finding"),
    [
        ((0, 0, 24, 16), None),
        ((3, 3, 3, 9), "box without an area"),
        ((0, 0, float("nan"), 9), "box without an area"),
        ((9, 3, 3, 9), "box without an area"),
        ((0, 0, 25, 16), "box that reaches over the picture"),
        ((-1, 0, 5, 5), "box that reaches over the picture"),
    ],
)
def test_boxes_lie_on_the_picture(monkeypatch, corners, finding):
    turn = Turn("where?", "there", boxes=(Box("it", corners),))
    assert found(examine(monkeypatch, [sample("a", turn)])) == ({finding: 1} if finding else {})


def test_empty_answers_and_samples_that_do_not_fit_are_named(monkeypatch):
    long = [Turn(f"what is number {n} of many, many things?", "a thing") for n in range(40)]
    samples = [sample("a", Turn("what?", " ")), sample("b", *long, seed=1)]
    assert found(examine(monkeypatch, samples)) == {
        "empty answer": 1,
        "longer than max_tokens=200: its last turns are left out": 1,
    }


def test_questions_with_nearly_always_the_same_answer_are_guessable(monkeypatch):
    answers = ["yes"] * 9 + ["no"] + ["red", "blue", "green", "black", "white"] + ["rare"]
    questions = ["is it?"] * 10 + ["what colour?"] * 5 + ["asked once?"]
    samples = [
        sample(str(n), Turn(q, a), seed=n) for n, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]
    examination = examine(monkeypatch, samples)
    assert examination.guesses == (examination_lib.Guess("is it?", "yes", 0.9, 10),)
    assert examination.num_repeated == 15 and examination.blind == 10 / 15


def test_records_are_examined_evenly_over_the_source(monkeypatch):
    samples = [sample(str(n), Turn("what?", "that"), seed=n) for n in range(10)]
    seen = []
    examination = examine(
        monkeypatch, samples, limit=4, progress=lambda numbers: seen.extend(numbers) or numbers
    )
    assert seen == [0, 3, 6, 9] and examination.num_examined == 4 and examination.num_records == 10


def test_at_least_one_record_is_examined(monkeypatch):
    with pytest.raises(ValueError, match="examine=0: must be at least 1"):
        examine(monkeypatch, [sample("a", Turn("what?", "that"))], limit=0)


def test_every_picture_is_decoded_once(monkeypatch):
    decoded = []
    seen = dataclasses.replace(
        sample("a", Turn("what?", "that")), images=(lambda: decoded.append(1) or picture(0),)
    )
    assert examine(monkeypatch, [seen]).num_usable == 1 and len(decoded) == 1


@pytest.mark.slow
def test_padding_is_that_of_the_config_or_of_rows_that_suit_the_data():
    sources = {"scenes": 1.0}
    row, report = examination_lib.padding(CONFIG, SPEC, sources=sources, targets="answers", window=256)
    assert row.max_tokens == 2048 and report.packed.tokens < 0.1 and report.packed.tiles < 0.1
    packing = PackingConfig(max_tokens=400, max_tiles=30, window=64)
    own, report = examination_lib.padding(
        dataclasses.replace(CONFIG, packing=packing), SPEC, sources=sources, targets="answers"
    )
    assert own == packing and report.packed.tiles > 0.5


@pytest.mark.slow
def test_the_page_shows_findings_escaped_and_boxes(monkeypatch):
    bad = sample("<b>a</b>", Turn("where?", "", boxes=(Box("it", (1, 1, 9, 9)),)))
    examination = examine(monkeypatch, [bad, sample("b", Turn("what?", "that, of several words"), seed=1)])
    monkeypatch.setattr(preview, "opened", lambda config, source: [bad])
    shown = {"scenes": preview.render_samples(CONFIG, SPEC, "scenes", count=1)}
    padding = {
        "sft": examination_lib.padding(CONFIG, SPEC, sources={"scenes": 1.0}, targets="answers", window=64)
    }
    page = data_page.render("name", [examination], padding, shown, max_tokens=200, max_tiles=1)
    assert "empty answer" in page and "&lt;b&gt;a&lt;/b&gt;" in page and "<b>a</b>" not in page
    assert 'alt="boxes"' in page and "http" not in page.replace("http-equiv", "")
    assert "tokens of a sample" in page and "every sample has 1 tile." in page


def test_what_is_left_out_of_a_record_is_counted(tmp_path, caplog):
    records = [{"id": i, "question": "what?", "answer": "this", "tools": "[1]"} for i in range(3)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    config = dataclasses.replace(CONFIG, root=str(tmp_path), sources=(LlavaConfig("files", "train.json"),))
    examination = examination_lib.examine(config, SPEC, "files")
    (finding,) = examination.findings
    assert (finding.what, finding.count, examination.num_usable) == ("left out: tools not read", 3, 3)
    assert "sample 0" in finding.examples[0] and "record 0" in finding.examples[0]
    sources, _ = open_sources(config, None)
    reader = SampleReader(sources, make_encoder(config, SPEC), config, "answers", 0)
    reader([Place(i, "files", i) for i in range(3)])
    assert caplog.text.count("left out") == 1 and "tools is not read" in caplog.text


def test_annotations_of_no_picture_are_counted_for_the_whole_file(tmp_path):
    Image.new("RGB", (8, 6)).save(tmp_path / "a.png")
    size = {"width": 8, "height": 6}
    owners = [9, "5", 5.0, None, 6, "nine", 9]  # a picture's id may be a text or a number
    content = {
        "images": [{"id": 5, "file_name": "a.png", **size}, {"id": 6, "file_name": "a.png", **size}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": i, "category_id": 1, "bbox": [0, 0, 2, 2]} for i in owners]
        + [{"image_id": 9, "category_id": 1, "bbox": [0, 0, 2, 2], "iscrowd": 1}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    config = dataclasses.replace(CONFIG, root=str(tmp_path), sources=(CocoConfig("files", "coco.json"),))
    findings = {f.what: f for f in examination_lib.examine(config, SPEC, "files", limit=1).findings}
    finding = findings["left out: unknown image id"]
    assert finding.count == 4 and len(finding.examples) == 3
    assert "annotations[0]: image_id='9' is of no picture" in finding.examples[0]
    content["annotations"] = content["annotations"][1:3]
    (tmp_path / "coco.json").write_text(json.dumps(content))
    found = examination_lib.examine(config, SPEC, "files", limit=1).findings
    assert not [finding for finding in found if finding.what.startswith("left out")]


def test_nothing_that_can_be_used_is_said_in_words(tmp_path):
    talk = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "this"}]
    (tmp_path / "train.json").write_text(json.dumps([{"image": "a.png", "conversations": talk}] * 9))
    config = dataclasses.replace(CONFIG, root=str(tmp_path), sources=(LlavaConfig("files", "train.json"),))
    with pytest.raises(ValueError) as caught:
        examination_lib.padding(config, SPEC, sources={"files": 1.0}, targets="answers", window=18)
    message = str(caught.value)
    assert message.startswith("none of 18 records can be used: 18 x placeholder mismatch: the questions have")
    assert "for example record" in message and "sample files-" in message and "write <image>" in message
    assert "{" not in message and "window" not in message and "\n" not in message


def test_what_is_odd_about_labels_in_pictures_is_counted(monkeypatch):
    def placed(identity: str, *boxes: Box, seed: int) -> Sample:
        labels = {"boxes": Boxes(boxes, (24, 16)), "kind": "ape"}
        return dataclasses.replace(sample(identity, Turn("what?", "it"), seed=seed), labels=labels)

    heads = (
        Detection(("ape", "bee", "cow"), size=32),
        Classification(("ape", "bee"), name="kind", field="kind"),
    )
    samples = [
        placed(
            "a", Box("ape", (0, 0, 3, 16)), Box("bee", (10, 0, 14, 16)), seed=1
        ),  # a square of 16 shows 4..20
        placed("b", seed=2),
        placed("c", seed=3),
    ]
    nothing = Instances((Box("bee", (8, 0, 12, 16)),), HeldMasks(np.zeros((1, 16, 24), bool)), (24, 16))
    samples[2] = dataclasses.replace(samples[2], labels={"mask": nothing})
    monkeypatch.setattr(examination_lib, "opened", lambda config, source: samples)
    config = dataclasses.replace(
        CONFIG,
        tiling=TilingConfig(tile_size=32, views="global", fit="crop"),
        augmentation=AugmentationConfig(crop=0.9),
    )
    examination = examination_lib.examine(config, dataclasses.replace(SPEC, labels=heads), "scenes")
    counts, examples = found(examination), {f.what: f.examples for f in examination.findings}
    assert counts[objects.NO_OBJECT] == 1 and examples[objects.NO_OBJECT] == ("b: boxes",)
    assert counts[objects.NOT_IN_TILE] == 1 and examples[objects.NOT_IN_TILE] == ("a: 1 of 2",)
    assert counts[objects.NO_PIXEL] == 1 and examples[objects.NO_PIXEL] == ("c: 1 of 1",)
    assert counts[objects.CUT_OFF] in (1, 2)
    assert examples["class of head 'boxes' that no record examined has"] == ("cow",)
    assert examples["class of head 'kind' that no record examined has"] == ("bee",)
