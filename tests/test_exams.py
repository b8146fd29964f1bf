"""Published exams: files are read as distributed, answers are judged, and what is wrong is said in a line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import exam_folders
import numpy as np
import pytest
from PIL import Image

from vl_jax import schema
from vl_jax.data.config import DataConfig
from vl_jax.data.sources.build import ExamConfig, open_source
from vl_jax.data.sources.exams.questions import LAYOUTS
from vl_jax.evaluate.exams.crowd import Crowd, pool_of
from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.exams.metrics import PhraseBoxes
from vl_jax.evaluate.exams.question import Question, questions_of
from vl_jax.evaluate.exams.scoring import read_answer
from vl_jax.evaluate.exams.stress import KINDS, STRENGTHS, Stress
from vl_jax.evaluate.exams.table import EXAMS, find_exam
from vl_jax.evaluate.metrics.exact_match import ExactMatch
from vl_jax.evaluate.runner import EvaluationConfig
from vl_jax.evaluate.task import Task


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for every layout."""
    root = tmp_path_factory.mktemp("exams")
    for layout in LAYOUTS:
        exam_folders.written(layout, root / layout)
    return root


def asked(folder: Path, layout: str, *, split: str = "", limit: int = 0) -> list[Question]:
    return questions_of(open_source(ExamConfig("x", layout, str(folder), split)), limit=limit)


# Of every layout: its ids, the references and clusters of the first and third question, and its groups.
EXPECTED = {
    "docvqa": ("100 101 102 103", ("red",), ("green",), {"question_type": "layout"}),
    "chartqa": ("human/0 human/1 augmented/0 augmented/1", ("red",), ("green",), {"half": "human"}),
    "textvqa": ("34602 34603 34604 34605", ("red",) * 10, ("green",) * 10, {}),
    "vqav2": ("42000 42001 43002 44003", ("red",) * 10, ("green",) * 10, {"answer_type": "other"}),
    "refcoco": ("0 1 2 3", ("[4.0, 4.0, 24.0, 20.0]",), ("[0.0, 0.0, 10.0, 10.0]",), {}),
    "ocrbench": ("0 1 2 3", ("red",), ("green",), {"category": "Regular Text Recognition"}),
    "mmbench": ("0 1000000 2000000 1", ("C",), ("A",), {"category": "attribute_reasoning"}),
    "pope": ("popular/1 popular/2 popular/3 popular/4", ("yes",), ("yes",), {"set": "popular"}),
    "captions": ("0 1 2 3", ("a red card", "red all over"), ("a green card on the table",), {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_questions_are_those_of_the_published_files(folders, layout):
    questions = asked(folders / layout, layout)
    ids, first, third, groups = EXPECTED[layout]
    assert [q.id for q in questions][:4] == ids.split()
    assert (questions[0].references, questions[2].references) == (first, third)
    assert dict(questions[0].groups) == groups
    together = questions[0].cluster == questions[1].cluster
    assert together is (layout != "captions")  # two questions about one picture hang together
    colours = [np.asarray(q.images[0]())[0, 0].argmax() for q in questions[:4]]
    assert colours == [0, 0, 0, 0] if layout == "mmbench" else colours == [0, 0, 1, 2]
    prompt = EXAMS[layout].prompts(questions)[0].turns[0].question
    assert prompt.count("<image>") == 1 and prompt.startswith("<image>\n")
    if layout != "captions":
        assert "Which colour is number 0?" in prompt


RIGHT = {"refcoco": "<|ref|>it<|/ref|><|det|>[[%d, %d, %d, %d]]<|/det|>"}


def right_answers(layout: str, questions: list[Question]) -> dict[str, str]:
    if layout != "refcoco":
        return {q.id: q.references[0] for q in questions}
    answers = {}
    for question in questions:
        box = np.array(json.loads(question.references[0])) * 999 / np.array([48, 32, 48, 32])
        answers[question.id] = RIGHT[layout] % tuple(np.rint(box))
    return answers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_right_answers_have_the_best_score_and_none_the_worst(folders, layout):
    questions, exam = asked(folders / layout, layout), EXAMS[layout]
    right = exam.score(questions, right_answers(layout, questions))
    wrong = exam.score(questions, {q.id: "" for q in questions})
    best = right.scores[exam.headline]
    assert wrong.scores[exam.headline] == 0 and right.scores["count"] == len(questions)
    if layout == "captions":
        assert best > 5 and right.scores["rouge_l"] == pytest.approx(1)
    else:
        assert best == 1
    low, high = wrong.intervals[exam.headline]
    assert (low, high) == (0, 0)
    assert all(sum(s["count"] for s in groups.values()) == len(questions) for groups in right.groups.values())


def test_an_interval_draws_pictures_not_questions():
    exam = EXAMS["docvqa"]
    questions = [Question(str(i), "?", ("red",), cluster=str(i // 4)) for i in range(40)]
    answers = {q.id: "red" if int(q.cluster) % 2 else "blue" for q in questions}
    together = exam.score(questions, answers)
    alone = exam.score([dataclasses.replace(q, cluster=q.id) for q in questions], answers)
    assert together.scores["anls"] == alone.scores["anls"] == 0.5
    low, high = together.intervals["anls"]
    assert high - low > 1.8 * np.diff(alone.intervals["anls"]).item()  # 10 pictures for 40 questions
    assert low < 0.5 < high and together.values["anls"]["4"] == 1


def test_mmbench_rotates_options_or_takes_the_rotations_of_the_file(folders, tmp_path):
    questions = asked(folders / "mmbench", "mmbench")
    first, second, third = questions[:3]
    assert [q.facts["options"] for q in (first, second, third)] == [
        {"A": "green", "B": "blue", "C": "red"},
        {"A": "blue", "B": "red", "C": "green"},
        {"A": "red", "B": "green", "C": "blue"},
    ]
    assert [q.references for q in (first, second, third)] == [("C",), ("B",), ("A",)]
    assert len(questions) == 3 + 2 + 4 + 2 and first.facts["hint"] == "Look well."
    # The first option as it stands is the answer under one rotation of each question alone.
    scored = EXAMS["mmbench"].score(questions, {q.id: "A" for q in questions})
    assert (scored.scores["circular"], scored.scores["vanilla"]) == (0, 0)
    assert len(asked(folders / "mmbench", "mmbench", limit=4)) == 5  # whole questions
    header, *rows = (folders / "mmbench" / "MMBench_DEV_EN.tsv").read_text().splitlines()
    cells = rows[1].split("\t")
    turned = [str(10**6 + 1), cells[1], cells[2], cells[4], cells[3], "", "", "A", *cells[8:]]
    (tmp_path / "given.tsv").write_text(
        "\n".join([header, rows[0].replace("\tC\t", "\tC\t"), rows[1], "\t".join(turned)])
    )
    given = asked(tmp_path, "mmbench")
    assert [q.id for q in given] == ["0", "1", "1000001"]  # in the file's own rotations


def test_refcoco_is_read_in_both_published_forms(tmp_path):
    found = [(p, q, a) for (p, q, _), a in zip(exam_folders.items(), exam_folders.BOXES, strict=True)]
    for form in ("jsonl", "json"):
        exam_folders.refcoco(tmp_path / form, found, form=form)
    lines, captions = (asked(tmp_path / form, "refcoco") for form in ("jsonl", "json"))
    assert [(q.id, q.text, q.references, dict(q.facts)) for q in lines] == [
        (q.id, q.text, q.references, dict(q.facts)) for q in captions
    ]


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ("999", "[[83, 124, 500, 624]]"),
        ("1000", "(at) [83, 125, 500, 625]"),
        ("share", "[0.083, 0.125, 0.5, 0.625]"),
        ("pixels", "[4, 4, 24, 20]"),
    ],
)
def test_boxes_are_read_on_the_grid_of_the_model(grid, said):
    metric = PhraseBoxes(grid=grid).start()
    metric.update("[4, 4, 24, 20]", said, width=48, height=32)
    scores = metric.compute()
    assert scores["box_accuracy"] == 1 and scores["box_accuracy_iou"] > 0.97
    metric.update("[4, 4, 24, 20]", "there", width=48, height=32)
    assert metric.compute()["box_accuracy_malformed"] == 0.5
    other = PhraseBoxes(grid="pixels" if grid != "pixels" else "share").start()
    other.update("[4, 4, 24, 20]", said, width=48, height=32)
    assert other.compute()["box_accuracy"] == 0


def test_a_split_is_chosen_where_there_are_several(folders, tmp_path):
    assert [q.id for q in asked(folders / "pope", "pope", split="random")] == [
        f"random/{i}" for i in (1, 2, 3, 4)
    ]
    assert len(asked(folders / "pope", "pope")) == 8
    found = [(p, q, a) for (p, q, _), a in zip(exam_folders.items(), exam_folders.BOXES, strict=True)]
    exam_folders.refcoco(tmp_path, found)
    (tmp_path / "refcoco_testA.jsonl").write_text(
        (tmp_path / "refcoco_val.jsonl").read_text().splitlines()[0]
    )
    with pytest.raises(
        ValueError, match=r"has refcoco_testA.jsonl, refcoco_val.jsonl; choose one with split"
    ):
        asked(tmp_path, "refcoco")
    assert len(asked(tmp_path, "refcoco", split="refcoco_testA")) == 1


def edited(path: Path, change) -> None:
    """A JSON file after its value was changed in place."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["data"][1].update(answers=[]), r"data 1: answers='\[\]': expected one text or more"),
        (lambda v: v["data"][1].pop("answers"), r"data 1: has no 'answers'; it has questionId, question"),
        (lambda v: v["data"][1].update(questionId=100), "id '100' is there twice"),
        (lambda v: v["data"][1].update(image="../secret.png"), r"'\.\./secret.png' leaves the image folder"),
        (lambda v: v["data"][1].update(image="/etc/passwd"), r"leaves the image folder"),
        (lambda v: v["data"][1].update(image="documents/none.png"), "no image file documents/none.png or"),
        (lambda v: v["data"][1].update(question=" "), r"data 1: question=' ': expected a text"),
        (lambda v: v["data"].clear(), "has no question"),
        (lambda v: v.pop("data"), "has no 'data'"),
        (lambda v: v.update(data=[1]), "data 0: expected an object, found int"),
    ],
)
def test_a_malformed_file_is_refused_in_a_line_with_the_place(tmp_path, change, message):
    exam_folders.written("docvqa", tmp_path)
    edited(tmp_path / "val_v1.0.json", change)
    (tmp_path.parent / "secret.png").write_bytes((tmp_path / "documents" / "p0.png").read_bytes())
    with pytest.raises(ValueError, match=message) as caught:
        asked(tmp_path, "docvqa")
    assert "\n" not in str(caught.value)


def test_a_picture_behind_a_link_out_of_the_folder_is_refused(tmp_path):
    exam_folders.written("docvqa", tmp_path / "exam")
    picture = tmp_path / "exam" / "documents" / "p0.png"
    picture.rename(tmp_path / "outside.png")
    picture.symlink_to(tmp_path / "outside.png")
    with pytest.raises(ValueError, match="leaves the image folder .* by a link"):
        asked(tmp_path / "exam", "docvqa")


def test_questions_and_answers_of_vqav2_have_to_belong_together(tmp_path):
    exam_folders.written("vqav2", tmp_path)
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    edited(annotations, lambda v: v["annotations"].append(v["annotations"][0]))
    with pytest.raises(ValueError, match="annotations 4: question_id=42000 has answers already"):
        asked(tmp_path, "vqav2")
    edited(annotations, lambda v: v.update(annotations=v["annotations"][1:4]))
    with pytest.raises(
        ValueError, match="question_id=42000 has no answers in v2_mscoco_val2014_annotations.json"
    ):
        asked(tmp_path, "vqav2")
    annotations.unlink()
    with pytest.raises(ValueError, match="has no file v2_mscoco_val2014_annotations.json or mscoco_val2014"):
        asked(tmp_path, "vqav2")


def test_predictions_have_to_be_those_of_the_questions(folders):
    questions, exam = asked(folders / "docvqa", "docvqa"), EXAMS["docvqa"]
    answers = right_answers("docvqa", questions)
    with pytest.raises(ValueError, match="1 of 4 questions have no prediction, such as id '100'"):
        exam.score(questions, {k: v for k, v in answers.items() if k != "100"})
    with pytest.raises(ValueError, match="1 predictions belong to no question, such as id '7'"):
        exam.score(questions, {**answers, "7": "x"})
    lone = asked(folders / "captions", "captions", limit=1)
    with pytest.raises(ValueError, match="score cider_d is nan: expected a finite number"):
        EXAMS["captions"].score(lone, {"0": "a red card"})
    with pytest.raises(ValueError, match="question '100' has no 'category', which its metric needs"):
        EXAMS["ocrbench"].score(questions, answers)


def test_an_exam_of_no_name_is_told_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="task='docvq'.*did you mean 'docvqa'"):
        find_exam("docvq")
    with pytest.raises(ValueError, match="layout='nlvr' of source 'x': there are docvqa"):
        ExamConfig("x", "nlvr")
    own = tmp_path / "own.py"
    own.write_text(
        "from vl_jax.evaluate.exams.table import EXAMS\nimport dataclasses\n"
        "MINE = dataclasses.replace(EXAMS['docvqa'], prompt='Q: {question} A:')\nOTHER = 3\n"
    )
    assert find_exam(f"{own}:MINE").prompt == "Q: {question} A:"
    with pytest.raises(ValueError, match="expected an Exam, found int"):
        find_exam(f"{own}:OTHER")


def test_an_exam_is_a_task_whose_rules_are_checked():
    config = EvaluationConfig(task=EXAMS["mmbench"])
    assert isinstance(config.task, Task)
    assert schema.from_json(schema.to_json(config), EvaluationConfig) == config
    data = DataConfig(evaluation=(ExamConfig("docvqa", "docvqa", "DocVQA"),))
    assert schema.from_json(schema.to_json(data), DataConfig) == data
    with pytest.raises(ValueError, match=r"\{answer\} is not known; there are \{question\}"):
        dataclasses.replace(EXAMS["docvqa"], prompt="{question} {answer}")
    with pytest.raises(ValueError, match="headline='f1': expected one of anls"):
        dataclasses.replace(EXAMS["docvqa"], headline="f1")
    with pytest.raises(ValueError, match="two scores are called 'exact_match'"):
        Exam("docvqa", "{question}", "exact_match", (ExactMatch(), ExactMatch()))


@pytest.mark.parametrize(
    ("parser", "answer"),
    [
        ("whole", "It is\n Answer: red\nso"),
        ("first_line", "It is"),
        ("last_line", "so"),
        ("after_answer", "red\nso"),
    ],
)
def test_a_parser_takes_the_answer_out_of_a_prediction(parser, answer):
    assert read_answer(" It is\n Answer: red\nso\n", parser) == answer
    assert read_answer("", parser) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_stress_keeps_the_size_grows_and_follows_from_the_seed(kind):
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (60, 90, 3)).astype(np.uint8)).resize((270, 180))
    before = np.asarray(picture, np.float64)

    def worse(strength: int, seed: str = "a") -> np.ndarray:
        found = Stress(kind, strength)(picture, seed=seed)
        assert found.size == picture.size and found.mode == "RGB"
        return np.asarray(found, np.float64)

    errors = [np.mean((worse(strength) - before) ** 2) for strength in STRENGTHS]
    assert errors[0] > 0 and errors == sorted(errors)
    np.testing.assert_array_equal(worse(3), worse(3))
    assert (worse(3, "a") != worse(3, "b")).any() == (kind == "noise")
    with pytest.raises(ValueError, match="strength=6: expected 1 to 5"):
        Stress(kind, 6)


def test_a_question_stands_among_pictures_of_others(folders):
    questions = asked(folders / "docvqa", "docvqa")
    for count in (2, 3):
        exam = dataclasses.replace(EXAMS["docvqa"], crowd=Crowd(count))
        for question, sample in zip(questions, exam.prompts(questions), strict=True):
            text = sample.turns[0].question
            assert text.count("<image>") == len(sample.images) == count
            number = int(text.split("about picture ")[1].split()[0])
            assert sample.images[number - 1] is question.images[0]
            others = {image.path for image in sample.images} - {question.images[0].path}
            assert len(others) == count - 1  # all different
        assert exam.prompts(questions) == exam.prompts(questions)
    assert len(pool_of(questions)) == 3
    with pytest.raises(ValueError, match="4 pictures in a prompt: there are only 3 different ones"):
        dataclasses.replace(EXAMS["docvqa"], crowd=Crowd(4)).prompts(questions)


def records(shared_data: Path, name: str) -> list[dict]:
    return json.loads((shared_data / name / "val.json").read_text())


def turns(record: dict) -> list[tuple[str, str]]:
    """Questions and answers of a record."""
    said = [turn["value"].replace("<image>\n", "") for turn in record["conversations"]]
    return list(zip(said[::2], said[1::2], strict=True))


def opened(shared_data: Path, name: str, record: dict) -> Image.Image:
    return Image.open(shared_data / name / record["image"]).convert("RGB")


def test_real_questions_in_published_layouts_are_scored_as_they_are_known_to_be(shared_data, tmp_path):
    """By the answer "yes" to everything, whose share can be counted in the records."""
    found = [
        (opened(shared_data, "easy_vqa", record), question, [answer])
        for record in records(shared_data, "easy_vqa")[:6]
        for question, answer in turns(record)
    ]
    seen: dict[int, Image.Image] = {}
    found = [(seen.setdefault(hash(picture.tobytes()), picture), q, a) for picture, q, a in found]
    exam_folders.vqav2(tmp_path, found)
    questions = asked(tmp_path, "vqav2")
    assert [q.text for q in questions] == [question for _, question, _ in found]
    scored = EXAMS["vqav2"].score(questions, {q.id: "yes" for q in questions})
    share = np.mean([answer == ["yes"] for *_, answer in found])
    assert scored.scores["vqa_accuracy"] == pytest.approx(share) and 0.2 < share < 0.6
    low, high = scored.intervals["vqa_accuracy"]
    assert low < share < high
    assert scored.groups["answer_type"]["other"]["vqa_accuracy"] == 0


@pytest.mark.slow
def test_real_documents_boxes_and_captions_in_published_layouts(shared_data, tmp_path):
    receipts = [
        (opened(shared_data, "sroie_receipts", record), question, [answer])
        for record in records(shared_data, "sroie_receipts")[:3]
        for question, answer in turns(record)[:4]
    ]
    exam_folders.docvqa(tmp_path / "docvqa", receipts)
    exam_folders.ocrbench(tmp_path / "ocrbench", receipts, category="Key Information Extraction")
    boxes, presence, said = [], [], []
    for record in records(shared_data, "coco256")[:5]:
        picture = opened(shared_data, "coco256", record)
        labels = [box["label"] for box in record["boxes"]]
        boxes += [
            (picture, b["label"], [json.dumps(b["bbox"])])
            for b in record["boxes"]
            if labels.count(b["label"]) == 1
        ]
        presence += [
            (picture, f"Is there a {label} in the image?", ["yes"]) for label in dict.fromkeys(labels)
        ]
        presence.append((picture, "Is there a giraffe in the image?", ["no"]))
        said.append((picture, "", [f"a photo of {label}" for label in dict.fromkeys(labels)]))
    exam_folders.refcoco(tmp_path / "refcoco", boxes)
    exam_folders.pope(tmp_path / "pope", presence)
    exam_folders.captions(tmp_path / "captions", said)
    for layout in ("docvqa", "ocrbench", "refcoco", "pope", "captions"):
        questions, exam = asked(tmp_path / layout, layout), EXAMS[layout]
        right = {q.id: q.references[0] for q in questions}
        if layout == "refcoco":
            exam = dataclasses.replace(exam, metrics=(PhraseBoxes(grid="pixels"),))
            sizes = [q.images[0]().size for q in questions]
            assert [(q.facts["width"], q.facts["height"]) for q in questions] == sizes
        best = exam.score(questions, right).scores
        assert best[exam.headline] == 1 or layout == "captions" and best["cider_d"] > 5, (layout, best)
        swapped = dict(zip(right, [*list(right.values())[1:], ""], strict=True))
        assert exam.score(questions, swapped).scores[exam.headline] < best[exam.headline]
