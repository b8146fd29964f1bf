"""The pages of docs/: their code runs, their links lead somewhere."""

from __future__ import annotations

import collections
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import notebooks
import pages
import pytest
import reader
from conftest import ROOT
from PIL import Image
from test_published_pairs import write_checkpoint

from vl_jax import cli, config
from vl_jax.data.sources.build import open_source
from vl_jax.data.sources.coco import CocoConfig
from vl_jax.data.sources.conversation import parse
from vl_jax.data.sources.label_studio.source import LabelStudioConfig
from vl_jax.data.sources.llava import LlavaConfig
from vl_jax.data.sources.meta import MetaConfig
from vl_jax.data.sources.placed import PlacedConfig
from vl_jax.data.sources.records import RecordsConfig
from vl_jax.evaluate.metrics.exact_match import ExactMatch
from vl_jax.evaluate.task import Compared
from vl_jax.evaluate.tasks.answers import Answers
from vl_jax.moe import conformance

PAGES = [ROOT / "README.md", ROOT / "experiments/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# In the order in which somebody would read them: what one page makes, a later one may use.
FIRST = ("README", "own_images", "fine_tune", "routing_scheme", "ablation", "pod")
READ = [
    *(
        next(page for page in PAGES if page.stem == name and page.parent.name != "experiments")
        for name in FIRST
    ),
    *(p for p in PAGES[2:] if p.stem not in FIRST and p.parent.name != "extending"),
    *(p for p in PAGES[2:] if p.parent.name == "extending"),
]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
# Commands that the tests cannot run, by what is lacking.
LACKING = {
    "needs the network": 18,
    "needs Google Cloud": 10,
    "needs a bucket": 1,
    "needs Docker": 2,
    "needs SLURM": 1,
    "needs two hosts": 1,
    "needs libtpu": 6,
    "takes minutes": 8,
    "needs a kit": 10,
}
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def pages_code(tmp_path_factory) -> Path:
    """A folder with every block of docs/extending that begins with the name of a file."""
    folder = tmp_path_factory.mktemp("extending")
    for page in (ROOT / "docs/extending").glob("*.md"):
        for block in pages.blocks(page):
            if block.file:
                assert not (folder / block.file).exists(), block.file
                reader.write_block(block, folder)
    return folder


@pytest.fixture
def importable(pages_code, monkeypatch) -> Path:
    monkeypatch.syspath_prepend(pages_code)
    yield pages_code
    for file in pages_code.glob("*.py"):
        sys.modules.pop(file.stem, None)


def test_links_lead_to_files():
    for page in PAGES:
        for link in LINK.findall(page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)}: {link}"


@pytest.mark.parametrize("loading", [[], ["--config.data.loading.num_workers=1"]], ids=["threads", "workers"])
@pytest.mark.slow
def test_parts_of_ones_own_train_together(pages_code, tmp_path, loading):
    arguments = ["train", f"--config={pages_code}/waves.py", f"--workdir={tmp_path}/run", *loading]
    if loading:
        arguments += ["--config.stages.fit.steps=3"]
    assert cli.main(arguments) == 0
    (result,) = (tmp_path / "run/eval/test").glob("*[0-9].json")
    scores = json.loads(result.read_text())["scores"]
    assert scores["count"] == 63  # one of 64 cannot be used
    assert loading or scores["within_half"] > 0.8
    assert "within half" in (tmp_path / "run/report.html").read_text()
    written = json.loads((tmp_path / "run/config.json").read_text())
    assert config.load(str(pages_code / "waves.py")).model.fusion.stream == "all"
    assert written["data"]["sources"]["train"]["_type"].endswith("my_source.py:Waves")


def test_a_metric_of_ones_own_stands_beside_exact_match(importable):
    own = importlib.import_module("my_metric").SharedWords()
    task = Answers(metrics=(ExactMatch(), own), headline="shared_words")
    compared = Compared(task.metrics, ("blind", "prior"))
    compared.update("a red dog", "a dog", blind="cat", prior="a red dog")
    found = compared.compute()
    assert found["shared_words"] == pytest.approx(2 / 3) and found["exact_match"] == 0
    assert found["blind_shared_words"] == 0 and found["prior_exact_match"] == 1 and found["count"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["my_scheme", "my_temperature"])
def test_the_schemes_of_the_page_conform(pages_code, name):
    results = conformance.check(f"{pages_code}/{name}.py:{name}", properties=conformance.PROPERTIES)
    assert not [result for result in results if result.passed is False]


def commands(page: Path) -> list[pages.Command]:
    return [c for block in pages.blocks(page) if block.language == "bash" for c in pages.commands(block)]


@pytest.fixture(scope="module")
def library(tmp_path_factory, pages_code) -> Path:
    """A folder with the data and the files that the pages speak of."""
    folder = tmp_path_factory.mktemp("library")
    reader.furnish(folder)
    for file in pages_code.glob("*.py"):
        shutil.copy(file, folder)
    for name, of in (("my_router", "my_router"), ("my_classes", "classification")):
        assert cli.main(["new", str(folder / f"{name}.py"), f"--from={of}"]) == 0
    return folder


def test_what_no_test_can_run_is_little_and_says_why():
    found = collections.Counter(c.lacks for page in READ for c in commands(page) if c.lacks)
    assert found == LACKING
    text = (ROOT / "docs/contributing.md").read_text().replace("\n", " ")
    for lacking in LACKING:
        assert f"*{lacking}*" in text


@pytest.mark.parametrize("page", [*READ, ROOT / "experiments/README.md"], ids=lambda p: p.stem)
def test_every_command_is_one_with_options_and_fields_that_exist(library, monkeypatch, page):
    monkeypatch.chdir(library)
    for command in commands(page):
        if not command.ours:
            elsewhere = command.lacks or command.words[0] in ("export", "python", "bash", "diff")
            assert elsewhere or (ROOT / command.words[0]).is_file(), command
            continue
        found = cli._parse(list(command.ours))
        own = Path(str(getattr(found, "config", None) or "").partition(":")[0])
        if own.suffix == ".py" and not own.is_file():
            block = next(b for p in READ for b in pages.blocks(p) if b.file == own.name)
            reader.write_block(block, library)
        if getattr(found, "config", None):
            config.load(found.config, found.overrides)


def test_every_block_of_python_is_python():
    known = {block.file for page in READ for block in pages.blocks(page) if block.file and not block.adds}
    for page in READ:
        for block in pages.blocks(page):
            if block.language == "python":
                compile(block.code, str(block), "exec")
                assert not block.adds or block.file in {*known, "my_router.py", "my_classes.py"}, block


def test_the_smallest_records_are_read():
    page = (ROOT / "docs/data.md").read_text()
    table = page[page.index("| form | smallest record |") : page.index("- Messages go by turns")]
    records = [json.loads(text) for text in re.findall(r"`(\{.*\})` \|", table)]
    records += [json.loads(text) for text in re.findall(r"`(\{\"frames\".*?\})`", page)]
    assert len(records) == 8
    for record in records:
        clip = {"image": ["0.png", "1.png"]} if "frames" in record else {}
        found = parse({**record, **clip}, "d.json, record 0", default_id="0")
        assert found.turns[-1].answer and not found.notes


@pytest.mark.parametrize(
    ("page", "begin", "file", "source"),
    [
        ("data", '{"id": "3"', "a.jsonl", LlavaConfig("s", "a.jsonl")),
        ("data", '{"talks"', "a.json", MetaConfig("s", "a.json")),
        ("data", '{"images"', "a.json", CocoConfig("s", "a.json")),
        ("data", '[{"id": 7', "a.json", LabelStudioConfig("s", "a.json")),
        ("data", "file,label", "a.csv", RecordsConfig("s", "a.csv", image="file", labels=("label",))),
        ("data", '{"id": "7"', "a.jsonl", LlavaConfig("s", "a.jsonl")),
        (
            *("data", '{"id": "tom"', "a.jsonl"),
            PlacedConfig("s", "a.jsonl", boxes="boxes", labels=("room",)),
        ),
        ("fine_tune", '{"id": "1"', "a.jsonl", LlavaConfig("s", "a.jsonl")),
        ("own_images", '{"id": "cat', "a.jsonl", LlavaConfig("s", "a.jsonl")),
    ],
)
def test_a_file_as_the_page_shows_it_is_read(tmp_path, page, begin, file, source):
    (block,) = (
        block
        for of in READ
        if of.stem == page
        for block in pages.blocks(of)
        if block.code.startswith(begin) and block.language in ("json", "text")
    )
    code = block.code.replace("\n", " ") + "\n" if file.endswith(".jsonl") else block.code
    (tmp_path / file).write_text(code)
    for name in ("a.jpg", "street.jpg", "cat.png", "cat/001.jpg", "shirts/1.jpg", "images/b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (640, 480)).save(tmp_path / name)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A cat."}]
    (tmp_path / "talks.jsonl").write_text(json.dumps({"image": "b.jpg", "conversations": turns}))
    (tmp_path / "seven.wav").write_bytes(reader.sound(7))
    found = open_source(source, root=str(tmp_path))
    sample = found[0]
    assert len(sample.images) == 1 and sample.images[0]().size[0] > 1 and not sample.notes
    assert sample.turns[0].answer or {*sample.labels} in ({"label"}, {"boxes", "room"})
    assert len(found) == (2 if begin == '{"talks"' else 1)  # repeat_time


def test_files_of_a_run_are_json_as_the_page_shows_them():
    found = [json.loads(b.code) for b in pages.blocks(ROOT / "docs/workdir.md") if b.language == "json"]
    assert len(found) == 2 and all(found)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_was_run_as_it_stands_and_tells_of_no_machine(path):
    text = path.read_text(encoding="utf-8")
    cells = notebooks.code_cells(json.loads(text))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = [output for cell in cells for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in shown) >= 1
    assert not any(output["output_type"] == "error" for output in shown) and len(text) < 400_000
    assert not re.search(r"/(tmp|home|root|work|Users|mnt|var)/", text)
    for cell in cells:
        compile("".join(cell["source"]), path.name, "exec")
    links = LINK.findall("".join("".join(cell["source"]) for cell in json.loads(text)["cells"]))
    assert links and all((path.parent / link).exists() for link in links)
    trains = next("".join(c["source"]) for c in cells if "vl_jax.train(" in "".join(c["source"]))
    assert trains.count("\n") < 10


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_works(path, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    text = path.read_text(encoding="utf-8")
    for name, count in (("steps", 4), ("loop.log_every", 2), ("loop.routing_every", 2)):
        text, found = re.subn(rf'(\\"{name}\\": )\d+', rf"\g<1>{count}", text)
        assert found == 1, name
    shown = list(notebooks.run(json.loads(text), path.name))
    written = notebooks.code_cells(json.loads(text))
    for new, old in zip(shown, written, strict=True):
        kinds = ([o["output_type"] for o in outputs] for outputs in (new, old["outputs"]))
        assert len({tuple(k) for k in kinds}) == 1, old["source"]


@pytest.mark.slow
def test_everything_on_the_pages_works(library, oracles):
    published = library / "deepseek-vl2-tiny"
    shutil.copytree(oracles / "deepseek_vl2/processor/tokenizer", published)
    shutil.copy(oracles / "deepseek_vl2/processor/processor_config.json", published)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(oracles / "deepseek_vl2/models/mla_noaux_sigmoid" / name, published)
    write_checkpoint(library / "clip-vit-base-patch32", "clip")
    for name in ("my_router.py", "my_classes.py", "my_experiment.py"):
        (library / name).unlink(missing_ok=True)  # whoever reads makes them
    # A process of its own: whoever reads has one device, and no checks of arguments.
    given = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "XLA_FLAGS": ""}
    read = [page for page in READ if page.parent.name != "extending"]  # whose code is run above
    words = [sys.executable, str(ROOT / "tests/reader.py"), *map(str, read)]
    found = subprocess.run(words, cwd=library, env=given, capture_output=True, text=True, timeout=1000)
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.count("\nread ") + found.stdout.startswith("read ") == len(read)
