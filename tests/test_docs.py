"""The pages of docs/: their code runs, their links lead somewhere."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from vl_jax import cli, config
from vl_jax.evaluate.metrics.exact_match import ExactMatch
from vl_jax.evaluate.task import Compared
from vl_jax.evaluate.tasks.answers import Answers
from vl_jax.moe import conformance

PAGES = [ROOT / "README.md", ROOT / "experiments/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n# (\w+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


@pytest.fixture(scope="module")
def pages_code(tmp_path_factory) -> Path:
    """A folder with every block of docs/extending that begins with the name of a file."""
    folder = tmp_path_factory.mktemp("extending")
    for page in (ROOT / "docs/extending").glob("*.md"):
        for name, code in BLOCK.findall(page.read_text()):
            assert not (folder / name).exists(), name
            (folder / name).write_text(code)
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


def test_the_scheme_of_the_page_conforms(pages_code):
    results = conformance.check(f"{pages_code}/my_scheme.py:my_scheme", properties=conformance.PROPERTIES)
    assert not [result for result in results if result.detail]
