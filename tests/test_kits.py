"""Kits of others run our models, and score as we do.

What needs a kit runs in the Python that VL_JAX_KIT_PYTHON names (see docs/kits.md), else it is skipped.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from kit_cases import MAKERS, cases
from kit_ours import OURS
from PIL import Image

import vl_jax
from vl_jax import ask, config
from vl_jax.data.encode import make_encoder
from vl_jax.data.published.picture_text import make_row, stacked
from vl_jax.data.sample import BadSample
from vl_jax.experiment import first_weights, model_spec, plan
from vl_jax.kits import run_vlmevalkit
from vl_jax.kits.answerer import Batches, Likelihood, PublishedAnswerer, RunAnswerer, open_answerer
from vl_jax.kits.kit import part_of
from vl_jax.kits.question import asked, choice, parts, picture, question
from vl_jax.runtime.errors import UserError
from vl_jax.train.step import TrainState

HERE = Path(__file__).parent
STORED = json.loads((HERE / "kit_scores.json").read_text())
PYTHON = os.environ.get("VL_JAX_KIT_PYTHON", "")
needs_kit = pytest.mark.skipif(
    not PYTHON, reason="set VL_JAX_KIT_PYTHON to the Python of an environment with a kit"
)
PICTURE = Image.new("RGB", (8, 6), "red")
PLAIN = choice({}, max_new_tokens=4)[0]


# Scores.


@pytest.mark.parametrize("task", MAKERS)
def test_scores_are_those_that_the_kit_gave(task):
    stored, scores = STORED["cases"][task], STORED["scores"][task]
    found = OURS[task](stored)
    assert found == pytest.approx(scores, abs=1e-9, rel=0)
    assert min(scores) < max(scores)


@needs_kit
def test_scores_agree_with_the_kits_on_drawn_cases():
    drawn = {task: cases(task, 1500) for task in MAKERS}
    every = [case for some in drawn.values() for case in some]
    kits = kit_scores(every)
    assert kits["scores"], "the environment has neither kit"
    for task, scores in kits["scores"].items():
        assert OURS[task](drawn[task]) == pytest.approx(scores, abs=1e-9, rel=0), task


def kit_scores(every: list[dict[str, Any]]) -> dict[str, Any]:
    command = [PYTHON, str(HERE / "kit_scores.py")]
    found = subprocess.run(command, input=json.dumps(every), capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout)


# Questions.


def test_pictures_that_open_a_question_are_followed_by_a_line_end():
    one = question("q", [("user", [PICTURE, PICTURE, "What is it?"])])
    assert one.said[0].text == "<image>\n<image>\nWhat is it?" and len(one.pictures) == 2
    assert asked("q", "What is it?", [PICTURE, PICTURE]) == one
    between = question("q", [("user", ["Is ", PICTURE, " like ", PICTURE, "?"])])
    assert between.said[0].text == "Is <image> like <image>?"
    assert asked("q", "Is <image> like <image>?", [PICTURE, PICTURE]) == between
    # As many marks as pictures, or none of them is one.
    assert asked("q", "Is <image> it?", [PICTURE, PICTURE]).said[0].text == "<image>\n<image>\nIs  it?"
    assert asked("q", "Is <image> it?", []).said[0].text == "Is  it?"


def test_a_conversation_becomes_a_sample_with_the_answer_in_its_place():
    said = [
        ("system", ["Be short."]),
        ("user", [PICTURE, "One?"]),
        ("user", ["Two?"]),
        ("assistant", ["yes"]),
        ("user", ["Three?"]),
    ]
    sample = question("task, document 3", said).sample("shown", answer="no")
    assert sample.system == "Be short." and sample.id == "task, document 3"
    turns = [(turn.question, turn.answer) for turn in sample.turns]
    assert turns == [("<image>\nOne?\nTwo?", "yes"), ("Three?", "no")]
    assert np.asarray(sample.images[0]()).shape == (6, 8, 3)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ([("user", ["a"]), ("assistant", ["b"])], "q: ends with assistant message; the user asks last"),
        ([("assistant", ["b"])], "q: assistant: expected user and assistant in turn, the user first"),
        ([("user", ["a"]), ("system", ["b"])], "q: user, system: expected user and assistant in turn"),
        ([("tool", ["a"])], "q: role 'tool': expected one of system, user, assistant"),
        ([("system", [PICTURE]), ("user", ["a"])], "q: a picture in a message of role system"),
        ([("system", ["a"])], "q: ends with no message"),
    ],
)
def test_a_conversation_that_cannot_be_answered_is_named(said, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        question("q", said)


def test_parts_of_a_message_are_texts_and_pictures(tmp_path):
    PICTURE.save(tmp_path / "a.png")
    content = [{"type": "image", "url": str(tmp_path / "a.png")}, {"type": "text", "text": "What?"}]
    assert parts("q", content, text="text", image="url") == [tmp_path / "a.png", "What?"]
    assert parts("q", "What?", text="text", image="url") == ["What?"]
    with pytest.raises(ValueError, match="q: has a part of type video"):
        parts("q", [{"type": "video", "url": "a.mp4"}], text="text", image="url")
    for value, shown in (("b.png", "'b.png', no such file"), (3, "a picture is int")):
        with pytest.raises(ValueError, match=shown):
            picture("q", value)


@pytest.mark.parametrize(
    ("given", "options", "until"),
    [
        ({}, {"max_new_tokens": 9}, ()),
        ({"max_new_tokens": 3, "temperature": 0, "top_p": None, "num_beams": 1, "do_sample": False},
         {"max_new_tokens": 3, "num_beams": 1}, ()),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"max_new_tokens": 9}, ()),
        ({"do_sample": True, "top_k": 0, "until": "\n"}, {"max_new_tokens": 9, "temperature": 1.0}, ("\n",)),
        ({"temperature": 0.5, "top_p": 0.9, "until": ["a", "", "b"]},
         {"max_new_tokens": 9, "temperature": 0.5, "top_p": 0.9}, ("a", "b")),
        ({"temperature": 0, "top_p": 0, "until": None}, {"max_new_tokens": 9}, ()),
    ],
)  # fmt: skip
def test_how_an_answer_is_chosen(given, options, until):
    found, unknown = choice(given, max_new_tokens=9)
    assert (dict(found.options), found.until, unknown) == (options, until, ())


def test_options_that_are_not_known_are_named():
    assert choice({"image_aspect_ratio": "pad"}, max_new_tokens=9)[1] == ("image_aspect_ratio",)
    for given, shown in (({"temperature": "hot"}, "temperature='hot'"), ({"until": [3]}, r"until=\[3\]")):
        with pytest.raises(ValueError, match=shown):
            choice(given, max_new_tokens=9)


# Batches.


@dataclasses.dataclass
class Echo:
    """Says what it was asked, of at most three questions at once."""

    rows: int = 3
    seen: list[Any] = dataclasses.field(default_factory=list)

    def answers(self, questions, choice, key):
        self.seen.append((len(questions), choice, key))
        bad = [q.name for q in questions if q.said[0].text == "bad"]
        if bad:
            raise BadSample("too_long", f"sample {bad[0]}: too long")
        return [f"{q.said[0].text}/{dict(choice.options)['max_new_tokens']}" for q in questions]

    def likelihoods(self, questions, texts):
        self.seen.append(len(questions))
        return [Likelihood(-float(len(text)), len(text.split()), text == "yes") for text in texts]


def echo_question(text: str):
    return asked(f"question {text}", text, [])


def test_answers_come_in_the_order_of_requests_and_batches_have_one_choice_each():
    model, short, long = Echo(), PLAIN, choice({}, max_new_tokens=8)[0]
    choices = [long if number % 3 == 0 else short for number in range(10)]
    found = Batches(model, progress=False).answers([str(n) for n in range(10)], echo_question, choices)
    assert found == [f"{n}/{8 if n % 3 == 0 else 4}" for n in range(10)]
    assert [(count, chosen) for count, chosen, _ in model.seen] == [
        (3, long), (1, long), (3, short), (3, short)
    ]  # fmt: skip
    assert all(key is None for *_, key in model.seen)


def test_a_question_that_cannot_be_asked_ends_all_or_has_an_empty_answer(caplog):
    texts = ["a", "bad", "b", "c"]
    with pytest.raises(ValueError, match="sample question bad: too long"):
        Batches(Echo(), progress=False).answers(texts, echo_question, [PLAIN] * 4)
    found = Batches(Echo(), skip=True, progress=False).answers(texts, echo_question, [PLAIN] * 4)
    assert found == ["a/4", "", "b/4", "c/4"] and "question bad" in caplog.text


def test_drawn_answers_have_a_key_of_their_own_and_the_same_seed_draws_the_same():
    drawn = choice({"temperature": 1}, max_new_tokens=4)[0]
    seen = []
    for seed in (0, 0, 1):
        model = Echo()
        Batches(model, seed=seed, progress=False).answers(list("abcd"), echo_question, [drawn] * 4)
        seen.append([tuple(np.asarray(jax.random.key_data(key))) for *_, key in model.seen])
    assert seen[0] == seen[1] != seen[2] and len(set(seen[0])) == 2


@pytest.mark.parametrize(
    ("workdir", "model", "size", "message"),
    [
        (None, None, 1, "give workdir=FOLDER of a run, or model=FOLDER"),
        (Path("a"), Path("b"), 1, "and not both"),
        (Path("a"), None, 0, "batch_size=0: must be at least 1"),
        (Path("no_such_run"), None, 1, "no_such_run"),
    ],
)
def test_folders_that_cannot_be_opened_are_named(workdir, model, size, message):
    with pytest.raises(ValueError, match=message):
        open_answerer(workdir, model, batch_size=size, dtype="float32")


def test_a_published_model_is_asked_by_its_own_prompts_and_what_fails_is_named():
    class Model:
        def prompts(self, requests, *, rows):
            if bad := next((r for r in requests if "bad" in r.conversation[0]["content"]), None):
                raise ValueError(f"cannot read {bad.conversation[0]['content']}")
            assert all(r.conversation[-1] == {"role": "assistant", "content": ""} for r in requests)
            lengths = [len(r.conversation[0]["content"]) + 100 * len(r.images) for r in requests]
            lengths += lengths[-1:] * (rows - len(lengths))
            blank = np.zeros((1, 0, 1, 1, 3), np.uint8)
            return stacked([make_row(np.ones(n, np.int32), np.zeros(n, bool), blank, None) for n in lengths])

        def answers(self, prompts, *, key, stop_strings, **options):
            assert key is None and stop_strings == ("end",) and options["max_new_tokens"] == 4
            return [str(length) for length in prompts.segment_ids.sum(axis=1)]

    answerer = PublishedAnswerer(Model(), rows=3)
    plain = dataclasses.replace(PLAIN, until=("end",))
    ask_of = [question(name, [("user", parts)]) for name, parts in (("a", ["what"]), ("b", [PICTURE, "is"]))]
    assert answerer.answers(ask_of, plain, None) == ["4", str(100 + len("<image>\nis"))]
    with pytest.raises(ValueError, match="odd: cannot read bad one"):
        answerer.answers([*ask_of, question("odd", [("user", ["bad one"])])], plain, None)
    with pytest.raises(UserError, match="only asked to write answers"):
        answerer.likelihoods(ask_of, ["x", "y"])


# The adapters, with stand-ins for what the kits hand over.


@pytest.fixture
def lmms(monkeypatch):
    """The adapter for lmms-eval, on a stand-in with the interface of version 0.7.3; it asks ``Echo``."""

    class Base:
        is_simple = True

        def __init__(self):
            self.task_dict = {}

    @dataclasses.dataclass
    class GenerationResult:
        text: str
        token_counts: Any = None

    @dataclasses.dataclass
    class ModelManifest:
        model_id: str
        simple_class_path: str
        chat_class_path: str

    stand_in(monkeypatch, "lmms_eval.api.model", lmms=Base)
    stand_in(monkeypatch, "lmms_eval.api.instance", GenerationResult=GenerationResult)
    stand_in(monkeypatch, "lmms_eval.models.registry_v2", ModelManifest=ModelManifest)
    monkeypatch.delitem(sys.modules, "vl_jax.kits.lmms_eval", raising=False)
    module = importlib.import_module("vl_jax.kits.lmms_eval")
    monkeypatch.setattr(module, "_opened", lambda *given, skip: Batches(Echo(), progress=False))
    yield module
    sys.modules.pop("vl_jax.kits.lmms_eval")


def stand_in(monkeypatch, name: str, **content: Any) -> None:
    for parent in [name.rsplit(".", n)[0] for n in range(1, name.count(".") + 1)]:
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
            sys.modules[parent].__path__ = []
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


DOCUMENTS = [{"q": f"what {n}?", "pictures": [PICTURE] * n, "a": ["yes", "no"][n % 2]} for n in range(5)]


def request(*args: Any, number: int) -> Any:
    return SimpleNamespace(args=(*args, number, "shapes", "test"), task_name="shapes", doc_id=number)


def test_lmms_eval_asks_with_pictures_beside_the_text(lmms, caplog):
    model = lmms.LmmsSimple(workdir="runs/mine", batch_size="2", device="cpu", max_batch_size=None)
    model.task_dict = {"shapes": {"test": DOCUMENTS}}
    options = [{"max_new_tokens": 3 + n % 2, "image_aspect_ratio": "pad"} for n in range(5)]
    asks = [
        request(d["q"], given, lambda x: x["pictures"], number=n)
        for n, (d, given) in enumerate(zip(DOCUMENTS, options, strict=True))
    ]
    mark = "<image>\n"
    expected = [f"{mark * n}what {n}?/{3 + n % 2}" for n in range(5)]
    assert model.generate_until(asks) == expected
    assert caplog.text.count("image_aspect_ratio") == 1 and "JAX_PLATFORMS" in caplog.text
    assert model.is_simple and lmms.manifest().simple_class_path == "vl_jax.kits.lmms_eval.LmmsSimple"


def test_lmms_eval_asks_with_conversations(lmms):
    model = lmms.LmmsChat(model="published")
    model.task_dict = {"shapes": {"test": DOCUMENTS}}

    def messages(document: Any) -> list[dict[str, Any]]:
        shown = [{"type": "image", "url": p} for p in document["pictures"]]
        return [{"role": "user", "content": [*shown, {"type": "text", "text": document["q"]}]}]

    found = model.generate_until([request("", messages, {"until": ["\n"]}, number=n) for n in (2, 0)])
    assert found == ["<image>\n<image>\nwhat 2?/128", "what 0?/128"]
    video = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    with pytest.raises(UserError, match="shapes, document 1: has a part of type video"):
        model.generate_until([request("", lambda _: video, {}, number=1)])
    assert not model.is_simple and lmms.manifest().chat_class_path == "vl_jax.kits.lmms_eval.LmmsChat"


def test_lmms_eval_gets_a_loss_for_a_choice_and_a_log_probability_for_a_target(lmms):
    model = lmms.LmmsSimple(workdir="runs/mine")
    model.task_dict = {"shapes": {"test": DOCUMENTS}}
    choices = [request("q", text, None, number=0) for text in ("yes", "not at all")]
    assert model.loglikelihood(choices) == [(3.0, True), (10 / 3, False)]
    (pair,) = model.loglikelihood([request("q", lambda d: d["a"], None, number=1)])
    assert pair == (-2.0, False) and pair.text == (-2.0, False)
    with pytest.raises(UserError, match="acc_mutual_info"):
        model.loglikelihood([SimpleNamespace(args=("", "yes"), task_name="shapes", doc_id=0)])
    with pytest.raises(UserError, match="task shapes: asks in several rounds"):
        model.generate_until_multi_round([request("", {}, None, number=0)])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workdirs": "x"}, "--model_args workdirs=x: known are workdir, model"),
        ({"batch_size": "auto"}, "--batch_size=auto: expected a number"),
        ({"unanswerable": "skip"}, "unanswerable='skip': expected stop or empty"),
    ],
)
def test_lmms_eval_is_told_what_is_wrong_in_one_line(lmms, given, message):
    with pytest.raises(UserError, match=message):
        lmms.LmmsSimple(**given)


def test_one_process_uses_all_devices(lmms, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start one process"):
        lmms.LmmsSimple(workdir="x")


def test_the_entry_point_leads_to_the_manifest(lmms):
    (target,) = re.findall(r'"lmms_eval.models": \["vl_jax=(\S+?)"\]', (HERE.parent / "setup.py").read_text())
    module, name = target.split(":")
    assert module == lmms.__name__ and getattr(lmms, name)().model_id == "vl_jax"


@pytest.fixture
def vlmeval(monkeypatch):
    """The adapter for VLMEvalKit, on a stand-in with its interface; it asks ``Echo``."""

    class BaseModel:
        def __init__(self):
            self.dump_image_func = None

        def generate(self, message: Any, dataset: str | None = None) -> str:
            assert all(item["type"] in self.allowed_types for item in message)
            return self.generate_inner(message, dataset)

    stand_in(monkeypatch, "vlmeval.vlm.base", BaseModel=BaseModel)
    stand_in(monkeypatch, "vlmeval.config", supported_VLM={})
    monkeypatch.delitem(sys.modules, "vl_jax.kits.vlmevalkit", raising=False)
    monkeypatch.setattr("vl_jax.kits.answerer.open_answerer", lambda *_, **__: Echo(rows=1))
    yield importlib.import_module("vl_jax.kits.vlmevalkit")
    sys.modules.pop("vl_jax.kits.vlmevalkit")


def test_vlmevalkit_asks_with_texts_and_pictures_in_order(vlmeval, tmp_path):
    PICTURE.save(tmp_path / "a.png")
    shown = {"type": "image", "value": str(tmp_path / "a.png")}
    vlmeval.prepare("mine", workdir="runs/mine", max_new_tokens=7)
    listed = sys.modules["vlmeval.config"].supported_VLM
    model = listed["mine"]()
    assert model.INTERLEAVE and sys.modules["vlmeval.vlm"].VLMEvalModel is vlmeval.VLMEvalModel
    message = [shown, {"type": "text", "value": "like "}, shown, {"type": "text", "value": "?"}]
    assert model.generate(message, dataset="MME") == "<image>\nlike <image>?/7"
    turns = [
        {"role": "user", "content": [{"type": "text", "value": "one"}]},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    assert model.chat_inner(turns) == "one/7"  # Echo says the first message again
    with pytest.raises(UserError, match="MME: a picture is 'b.png', no such file"):
        model.generate([{"type": "image", "value": "b.png"}], dataset="MME")
    with pytest.raises(UserError, match="colour='red': VLMEvalModel has no such option"):
        vlmeval.VLMEvalModel(workdir="x", colour="red")


def test_vlmevalkit_is_started_with_a_model_on_its_list(vlmeval, tmp_path, capsys):
    script = tmp_path / "run.py"
    script.write_text(
        "import sys\nfrom vlmeval.config import supported_VLM\nprint(list(supported_VLM), sys.argv[1:])\n"
    )
    own = [f"--run={script}", "--workdir=runs/mine", "--name=mine"]
    assert run_vlmevalkit.run([*own, "--", "--data", "MME"]) == 0
    assert run_vlmevalkit.run([*own, "--", "--config", "c.json"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == ["['mine'] ['--model', 'mine', '--data', 'MME']", "['mine'] ['--config', 'c.json']"]
    assert run_vlmevalkit.run(["--workdir=a", "--model=b"]) == 2
    assert capsys.readouterr().err.startswith("error: give --workdir, the folder of a run, or --model")
    assert run_vlmevalkit.run(["--workdir=a", f"--run={tmp_path}/none.py"]) == 2
    assert capsys.readouterr().err == f"error: --run={tmp_path}/none.py: no such file\n"


def test_a_kit_that_is_not_installed_is_named_in_one_line():
    with pytest.raises(UserError, match="SomeKit is not installed here .no package no_such_kit.: install it"):
        part_of("SomeKit", "no_such_kit.model")


# A model.


@pytest.fixture(scope="module")
def opened() -> ask.AskedRun:
    """A model as it begins, with room for two pictures."""
    wanted = [("data.max_tiles", "2"), ("data.max_tokens", "128")]
    experiment = config.load(str(HERE / "tiny_experiment.py"), wanted)
    layout = plan(experiment)
    begun = first_weights(experiment, layout)
    state = TrainState(np.zeros((), np.int32), begun.params, None, begun.routing)
    return ask.AskedRun(experiment, layout, state, make_encoder(experiment.data, model_spec(experiment)))


@pytest.mark.slow
def test_a_run_answers_a_batch_as_it_answers_one_by_one(opened, tmp_path):
    files = [tmp_path / f"{colour}.png" for colour in ("red", "green")]
    for file in files:
        Image.new("RGB", (40, 24), file.stem).save(file)
    questions = [
        asked("a", "what colour is it?", [files[0]]),
        asked("b", "what", [files[1]]),
        asked("c", "hello", []),
        asked("d", "which is green?", files),
    ]
    found = RunAnswerer(opened, 8).answers(questions, PLAIN, None)
    for said, (text, image) in zip(
        found, [("what colour is it?", files[0]), ("what", files[1]), ("hello", None)], strict=False
    ):
        assert said == "".join(opened.stream(text, image=image, max_new_tokens=4))
    ended = dataclasses.replace(PLAIN, until=(found[0][1:3],))
    assert RunAnswerer(opened, 8).answers(questions[:1], ended, None) == [
        found[0].partition(found[0][1:3])[0]
    ]


@pytest.mark.slow
def test_how_likely_an_answer_is_follows_from_the_logits(opened):
    questions, texts = [asked("a", "what colour?", [PICTURE]), asked("b", "why?", [])], ["a red circle", "no"]
    found = RunAnswerer(opened, 8).likelihoods(questions, texts)

    @jax.jit
    def logits_of(params: Any, batch: Any) -> Any:
        output: Any = opened.layout.model.apply({"params": params}, batch, opened.state.routing)
        return opened.layout.model.apply({"params": params}, output.hidden, method="logits")

    for likelihood, one, text in zip(found, questions, texts, strict=True):
        ids = opened.encoder.tokenizer.encode(text)
        example = opened.encoder.example(one.sample("shown", answer=text), targets="answers")
        logits = np.asarray(logits_of(opened.state.params, opened.encoder.collate([[example]] * 8)))[0]
        start = example.answer_runs[-1].start - 1
        here = logits[start : start + len(ids)].astype(np.float64)
        expected = here[np.arange(len(ids)), ids] - np.logaddexp.reduce(here, axis=-1)
        assert likelihood.tokens == len(ids)
        assert likelihood.total == pytest.approx(expected.sum(), rel=1e-4)
        assert likelihood.greedy == (here.argmax(axis=-1) == ids).all()


# The real kit.


def write_task(folder: Path) -> list[dict[str, Any]]:
    """Two tasks about small drawings in the kit's form, and their documents."""
    (folder / "tasks").mkdir()
    colours, documents = ("red", "green", "blue"), []
    for number in range(7):
        file = folder / f"{number}.png"
        Image.new("RGB", (30, 20 + 4 * number), colours[number % 3]).save(file)
        pictures = [str(file)] * (1 + number % 2)
        asks = f"what colour is picture {number}?"
        documents.append({"question": asks, "answer": colours[number % 3], "pictures": pictures})
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, documents)))
    common = "\n".join(
        (
            f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/test.jsonl",
            'test_split: test\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"',
            "doc_to_visual: !function shown.pictures\n",
        )
    )
    metric = "metric_list:\n  - metric: {}\n    aggregation: mean\n    higher_is_better: true\n"
    (folder / "tasks/drawn.yaml").write_text(
        f"task: drawn\noutput_type: generate_until\n{common}"
        f'generation_kwargs:\n  max_new_tokens: 6\n  until: ["\\n\\n"]\n{metric.format("exact_match")}'
    )
    (folder / "tasks/chosen.yaml").write_text(
        f"task: chosen\noutput_type: multiple_choice\n{common}doc_to_choice: {json.dumps(colours)}\n"
        f"{metric.format('acc')}"
    )
    (folder / "tasks/shown.py").write_text(
        'from PIL import Image\n\n\ndef pictures(doc):\n    return [Image.open(f) for f in doc["pictures"]]\n'
    )
    return documents


def run_kit(folder: Path, *options: str) -> dict[str, list[dict[str, Any]]]:
    """The kit's own command in a process; the samples that it logs, by task."""
    out = folder / f"out{len(list(folder.glob('out*')))}"
    command = [PYTHON, "-m", "lmms_eval", "--model", "vl_jax", "--model_args", f"workdir={folder}/run"]
    command += ["--include_path", str(folder / "tasks"), "--output_path", str(out), "--log_samples", *options]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    env = {**os.environ, **offline, "PYTHONPATH": str(HERE.parent), "XLA_FLAGS": ""}
    found = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, cwd=folder)
    logged = {}
    for file in out.rglob("*_samples_*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        logged[file.stem.rpartition("_samples_")[2]] = sorted(lines, key=lambda line: line["doc_id"])
    assert logged, found.stderr[-2000:]
    return logged


@needs_kit
@pytest.mark.slow
def test_the_real_lmms_eval_runs_a_run(tmp_path):
    if subprocess.run([PYTHON, "-c", "import lmms_eval"], capture_output=True, timeout=600).returncode:
        pytest.skip(f"lmms_eval is not installed in the environment of {PYTHON}")
    documents = write_task(tmp_path)
    wanted = {"data.max_tiles": 2, "data.max_tokens": 128}
    run = vl_jax.train(str(HERE / "tiny_experiment.py"), tmp_path / "run", wanted)
    answerer = RunAnswerer(ask.AskedRun(run.experiment, run.layout, run.state, run.encoder), 8)
    questions = [asked(d["question"], d["question"], [Path(p) for p in d["pictures"]]) for d in documents]
    ours = answerer.answers(questions, choice({"until": "\n\n"}, max_new_tokens=6)[0], None)
    chat = run_kit(tmp_path, "--tasks", "drawn", "--batch_size", "4")["drawn"]
    assert [line["filtered_resps"].strip() for line in chat] == [text.strip() for text in ours]
    simple = run_kit(tmp_path, "--tasks", "drawn,chosen", "--batch_size", "3", "--force_simple")
    assert [line["filtered_resps"] for line in simple["drawn"]] == [line["filtered_resps"] for line in chat]
    for line, asking in zip(simple["chosen"], questions, strict=True):
        likely = answerer.likelihoods([asking] * 3, ["red", "green", "blue"])
        said = [pair if isinstance(pair, list) else json.loads(pair) for pair in line["filtered_resps"]]
        expected = [-found.total / found.tokens for found in likely]
        assert [float(pair[0]) for pair in said] == pytest.approx(expected, rel=1e-4)
        assert line["acc"] == float(
            int(np.argmin(expected)) == ["red", "green", "blue"].index(line["target"])
        )
