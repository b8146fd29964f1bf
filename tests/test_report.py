from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from vl_jax.metrics import MetricsWriter
from vl_jax.report.charts import Series, line_chart, number, thin, ticks, with_error
from vl_jax.report.gallery import MAX_SAMPLES, _box, choose
from vl_jax.report.results import read_records
from vl_jax.report.run import write_report

VOID = {"meta", "br", "img", "hr", "input", "link"}
KINDS = {"colour": 0.97, "文字": 0.5}


class Page(HTMLParser):
    """Checks that every element is closed in order, and keeps text, attributes and element names."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.names: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data + "\n"


def _sample(number: int, **changes) -> dict:
    row = {
        "id": f"id-{number}",
        "question": f"question {number}?",
        "answer": "red",
        "prediction": "red",
        "blind_prediction": "blue",
        "kind": "colour",
        "language": "en",
        "image": "images/0.png",
        "boxes": [{"label": "ball", "corners": [1, 2, 5, 7]}],
    }
    return row | changes


def _log(folder: Path) -> None:
    with MetricsWriter(folder) as writer:
        for step in range(0, 40, 2):
            scalars = {
                "loss": 4.0 - step / 20,
                "accuracy": step / 40,
                "learning_rate/adapter": 1e-3,
                "grad_norm": 1.0,
            }
            arrays = {
                "routing/load": [[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], [[0.2, 0.3, 0.5], [0.0, 0.0, 0.0]]],
                "routing/maxvio": [0.5, float("nan")],
                "routing/maxvio_running": [0.25, 0.1],
                "routing/dead": [1, 0],
                "routing/drop_rate": [0.0, 0.1],
            }
            writer.write(step, scalars, arrays, stage="align" if step < 20 else "sft")


def _evaluate(folder: Path, samples: list[dict], *, step: int = 38, flat: bool = False) -> None:
    """What an evaluation leaves; with ``flat`` as versions wrote it that knew one metric only."""
    task = folder / "eval" / "scenes"
    (task / "images").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 10), (255, 0, 0)).save(task / "images" / "0.png")
    scores = {
        kind: {"count": 7, "exact_match": score, "blind_exact_match": 0.3, "prior_exact_match": 0.2}
        for kind, score in KINDS.items()
    }
    result: dict = {"task": "scenes", "step": step}
    shares = {"exact_match": 0.912, "blind_exact_match": 0.301, "prior_exact_match": 0.35}
    if flat:
        result |= {**shares, "num_questions": 14, "by_kind": scores, "by_language": scores}
    else:
        result |= {"headline": "exact_match", "scores": {**shares, "count": 14}, "shares": list(shares)}
        result |= {"groups": {"kind": scores, "language": scores}}
        samples = [{"correct": s["prediction"] == s["answer"], **s} for s in samples]
    (task / f"{step}.json").write_text(json.dumps(result))
    lines = "".join(json.dumps(row) + "\n" for row in samples)
    (task / f"{step}.samples.jsonl").write_text(lines, encoding="utf-8")


@pytest.fixture
def full(tmp_path: Path) -> Path:
    folder = tmp_path / "run-7"
    folder.mkdir()
    _log(folder)
    _evaluate(
        folder,
        [_sample(0), _sample(1, question="什么颜色？", answer="红色", prediction="绿色", language="zh")],
    )
    (folder / "config.json").write_text(
        json.dumps({"_type": "vl_jax.x:XConfig", "model": {"num_experts": 16}})
    )
    (folder / "run.json").write_text(json.dumps({"versions": {"jax": "0.10.2"}, "num_params": 1234567}))
    return folder


def _page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_page_refers_to_nothing_outside_itself(full: Path):
    page = _page(full)
    text = (full / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\(|@import|//[a-z]", re.sub(r"base64,[^\"]*", "", text))
    assert not {"script", "link", "iframe"} & set(page.names)
    links = [value for name, value in page.attributes if name in ("href", "src", "srcset", "xlink:href")]
    assert links and all(value.startswith("data:image/") for value in links)


def test_every_kind_sample_stage_and_fact_is_on_the_page(full: Path):
    text = _page(full).text
    expected = ["run-7", "91.2 %", "30.1 %", "35.0 %", "+61.1 points", *KINDS, "97.0 %", "align", "sft"]
    expected += [
        "question 0?",
        "什么颜色？",
        "绿色",
        "红色",
        "ball",
        "id-1",
        "1 of 2 saved answers are right.",
    ]
    expected += ["num_experts = 16", "XConfig", "versions.jax", "0.10.2", "1,234,567", "grad_norm"]
    assert [word for word in expected if word not in text] == []


def test_heat_map_shows_load_as_multiple_of_an_even_share(full: Path):
    text = _page(full).text
    assert "layer 0, expert 0: 1.50 × even share" in text  # text: 0.5 of a mean of 1/3
    assert "layer 0, expert 0: 3.00 × even share" in text  # vision: everything on one of three experts
    assert "layer 1, expert 2: 1.50 × even share" in text


def test_embedded_picture_is_the_file(full: Path):
    page = _page(full)
    uri = next(value for name, value in page.attributes if value.startswith("data:image/png"))
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        assert image.size == (8, 10) and image.getpixel((3, 3)) == (255, 0, 0)


def test_box_is_drawn_at_its_corners(full: Path):
    text = write_report(full).read_text(encoding="utf-8")
    assert '<rect class="box" x="1" y="2" width="4" height="5"/>' in text
    assert 'viewBox="0 0 8 10"' in text


def test_large_picture_is_reduced_and_keeps_box_coordinates(full: Path):
    Image.new("RGB", (2000, 1000)).save(full / "eval" / "scenes" / "images" / "0.png")
    text = write_report(full).read_text(encoding="utf-8")
    assert 'viewBox="0 0 2000 1000"' in text
    uri = re.search(r'data:image/jpeg;base64,([^"]*)', text)
    assert uri is not None
    with Image.open(io.BytesIO(base64.b64decode(uri[1]))) as image:
        assert image.size == (640, 320)


def test_text_of_a_model_cannot_become_markup(tmp_path: Path):
    attack = "<script>alert(1)</script>\"'&"
    names = ("question", "answer", "prediction", "blind_prediction", "kind", "language", "id")
    row = _sample(0, **{name: attack for name in names}, boxes=[{"label": attack, "corners": [0, 0, 1, 1]}])
    _evaluate(tmp_path, [row])
    page = _page(tmp_path)
    assert "script" not in page.names
    assert page.text.count(attack) >= len(names)


@pytest.mark.parametrize(
    ("absent", "sentence"),
    [
        ("config.json", "No config.json."),
        ("run.json", "No run.json."),
        ("metrics.jsonl", "No metrics.jsonl yet."),
        ("eval/scenes/38.samples.jsonl", "No samples were saved."),
        ("eval/scenes/38.json", "No evaluation yet."),
        ("eval/scenes/images/0.png", "No file images/0.png."),
    ],
)
def test_absent_part_is_named_and_the_rest_stays(full: Path, absent: str, sentence: str):
    (full / absent).unlink()
    text = _page(full).text
    assert sentence in text
    assert all(word in text for word in ("Result", "Training", "Samples", "Routing", "Configuration", "Run"))


def test_empty_folder_makes_a_page(tmp_path: Path):
    assert "No training steps logged yet." in _page(tmp_path).text


def test_run_without_experts_says_so(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        writer.write(0, {"loss": 1.0})
    assert "No routing statistics" in _page(tmp_path).text


def test_newest_step_of_a_task_is_the_headline(full: Path):
    _evaluate(full, [_sample(5)], step=4)
    text = _page(full).text
    assert "step 38" in text and "question 0?" in text and "question 5?" not in text
    assert "Exact match over training" in text


def test_what_was_measured_while_training_has_its_charts(tmp_path: Path):
    """The held-out loss of every source in one chart, and the headline of a task once it has two results."""
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 41):
            held_out = {"eval/scenes/loss": 2 - step / 40, "eval/words/loss": 3 - step / 40}
            writer.write(step, {"loss": 1.0} | (held_out if step % 10 == 0 else {}), {}, stage="sft")
    for step in (20, 40):
        _evaluate(tmp_path, [_sample(0)], step=step)
    page = _page(tmp_path)
    titles = re.findall(r"<h3>([^<]*)</h3>", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Exact match over training" in titles and titles.count("Loss on held-out sources") == 1
    assert "scenes/loss" in page.text and "words/loss" in page.text and "eval/scenes/loss" not in titles
    assert "Loss on held-out sources" not in _page_of_a_run_that_was_not_examined(tmp_path / "other")


def test_weights_of_modalities_stand_in_one_chart(tmp_path: Path):
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 5):
            writer.write(step, {"loss": 1.0, "gate/weight/image": 0.1 * step, "gate/weight/text": 0.5}, {})
    page = _page(tmp_path)
    titles = re.findall(r"<h3>([^<]*)</h3>", (tmp_path / "report.html").read_text(encoding="utf-8"))
    assert titles.count("How much each modality counts") == 1 and "image" in page.text
    assert not [title for title in titles if "eight" in title and "modality" not in title]


def _page_of_a_run_that_was_not_examined(folder: Path) -> str:
    folder.mkdir()
    _log(folder)
    return _page(folder).text


def test_missing_folder_is_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match="no such folder"):
        write_report(tmp_path / "nothing")


def test_broken_file_is_named(full: Path):
    (full / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json: not valid JSON"):
        write_report(full)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "must hold an object"),
        ({"scores": {"a": 1.0}}, "headline is missing"),
        ({"scores": 3, "headline": "a"}, "scores is missing"),
    ],
)
def test_a_result_of_which_a_part_is_missing_is_named(full: Path, content, said):
    file = next(full.glob("eval/*/*.json"))
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{file.name}: {said}") as told:
        write_report(full)
    assert "\n" not in str(told.value)


def test_a_mean_has_the_digits_that_its_interval_tells():
    assert with_error(0.71688, 0.00932) == "0.7169 ± 0.0093"
    assert with_error(181.66, 4.27) == "181.7 ± 4.3" and with_error(3161.4, 120.0) == "3161 ± 120"
    assert with_error(12_345.0, 15.0) == "12.3k ± 15" and with_error(1e-4, 1e-5) == "1e-4 ± 1e-5"
    assert with_error(0.5, 1e-12) == "0.5 ± 1e-12"


def test_labels_of_boxes_in_the_right_half_end_at_their_box(full: Path):
    found = re.findall(r'text-anchor="(start|end)"', write_report(full).read_text())
    assert found
    left, right = ({"corners": corners, "label": "a box"} for corners in ((0, 0, 4, 4), (6, 0, 10, 4)))
    assert 'x="0"' in _box(left, width=10) and 'text-anchor="start"' in _box(left, width=10)
    assert 'x="10"' in _box(right, width=10) and 'text-anchor="end"' in _box(right, width=10)


def test_page_depends_on_the_files_only(full: Path):
    assert write_report(full).read_bytes() == write_report(full).read_bytes()


def test_gallery_takes_groups_in_turn():
    rows = [_sample(n) for n in range(50)] + [_sample(50, correct=False), _sample(51, language="zh")]
    chosen = choose(rows, ("kind", "language"), limit=MAX_SAMPLES)
    assert [row["id"] for row in chosen[:4]] == ["id-0", "id-50", "id-51", "id-1"]
    assert len(chosen) == MAX_SAMPLES


def test_samples_with_a_picture_come_first(tmp_path: Path):
    _evaluate(tmp_path, [_sample(n, image=None) for n in range(MAX_SAMPLES)] + [_sample(99)])
    text = _page(tmp_path).text
    assert "id-99" in text and f"id-{MAX_SAMPLES - 2}\n" in text and f"id-{MAX_SAMPLES - 1}\n" not in text


def test_what_is_not_known_of_a_sample_has_no_tag(tmp_path: Path):
    _evaluate(tmp_path, [_sample(0, language="")])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert '<span class="tag">colour</span>' in page and '<span class="tag"></span>' not in page


def test_an_older_result_makes_the_same_page(tmp_path: Path):
    pages = []
    for name, flat in (("new", False), ("old", True)):
        folder = tmp_path / name / "run"
        folder.mkdir(parents=True)
        _evaluate(folder, [_sample(0), _sample(1, prediction="green")], flat=flat)
        pages.append(write_report(folder).read_bytes())
    assert pages[0] == pages[1]


def test_an_older_record_is_right_if_its_words_are_and_the_verdict_of_the_evaluator_wins(tmp_path: Path):
    changes = [{"answer": "Red ", "prediction": "red."}, {"prediction": None}]
    changes += [{"prediction": "crimson", "correct": True}]
    _evaluate(tmp_path, [_sample(n, **c) for n, c in enumerate(changes)], flat=True)
    records = read_records(tmp_path / "eval" / "scenes" / "38.json")
    assert [record["correct"] for record in records] == [True, False, True]


def test_a_score_that_is_no_share_has_no_percentage_and_no_bar(tmp_path: Path):
    folder = tmp_path / "eval" / "depth"
    folder.mkdir(parents=True)
    result = {
        "task": "depth",
        "step": 3,
        "headline": "rmse",
        "scores": {"rmse": 0.25, "mean_rmse": 0.5, "count": 1200},
        "groups": {"scene_type": {"kitchen": {"rmse": 0.125}}},
        "shares": [],
    }
    (folder / "3.json").write_text(json.dumps(result))
    records = [{"id": "a", "scene_type": "kitchen", "error_m": 0.75}, {"id": "b", "scene_type": "attic"}]
    (folder / "3.samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    page = _page(tmp_path)
    assert all(word in page.text for word in ("rmse", "0.25", "mean rmse 0.5", "1,200 samples", "0.125"))
    assert all(word in page.text for word in ("scene type", "kitchen", "error m", "0.75", "attic"))
    assert "2 samples were saved." in page.text
    assert "%" not in page.text and "points" not in page.text
    assert "bar" not in [value for name, value in page.attributes if name == "class"]


def test_groups_without_the_headline_have_bars_of_what_they_have(tmp_path: Path):
    folder = tmp_path / "eval" / "road"
    folder.mkdir(parents=True)
    result = {
        "task": "road",
        "step": 3,
        "headline": "mean_iou",
        "scores": {"mean_iou": 0.5, "count": 9},
        "groups": {"class": {"sky": {"iou": 0.75}, "pole": {"iou": 0.25}}},
        "shares": ["mean_iou", "iou"],
    }
    (folder / "3.json").write_text(json.dumps(result))
    page = _page(tmp_path)
    assert "75.0 %" in page.text and "–" not in page.text.partition("By group")[2]
    bars = [value for name, value in page.attributes if name == "style" and "width:75" in (value or "")]
    assert len(bars) == 1


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 47, count=4) == [20, 40]
    assert ticks(5, 5) == [5]


def test_thinning_takes_means_and_keeps_the_last_step():
    assert thin([(n, float(n)) for n in range(5)], limit=3) == [(1, 0.5), (3, 2.5), (4, 4.0)]
    assert thin([(0, None), (1, 2.0), (2, None), (3, None)], limit=2) == [(1, 2.0), (3, None)]


def test_line_has_a_gap_where_a_value_is_missing():
    chart = line_chart([Series("a", [(0, 1.0), (1, None), (2, 3.0), (3, 4.0)])], title="t")
    path = re.search(r' d="([^"]*)"', chart)
    assert path is not None and path[1].count("M") == 2 and path[1].count("L") == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.00003, "3e-5"), (12345, "12.3k"), (2.5e6, "2.5M"), (0.12345, "0.1235")],
)
def test_numbers_are_short(value, text: str):
    assert number(value) == text
