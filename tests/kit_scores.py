"""Scores of the kits' own scripts. It runs in the Python of a kit and imports nothing of ours.

PYTHON_OF_A_KIT tests/kit_scores.py < cases.json > scores.json

Cases are those of ``kit_cases``. A task whose kit is not installed there is left out of the result.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

Cases = list[dict[str, Any]]


def vqav2(cases: Cases) -> list[float]:
    task = importlib.import_module("lmms_eval.tasks.vqav2.utils")
    found = []
    for case in cases:
        answers = [{"answer": text, "answer_id": n} for n, text in enumerate(case["references"], start=1)]
        document = {"question_id": 0, "answers": answers}
        found.append(task.vqav2_process_results_val(document, [case["prediction"]])["exact_match"])
    return found


def textvqa(cases: Cases) -> list[float]:
    task = importlib.import_module("lmms_eval.tasks.textvqa.utils")
    return [
        task.textvqa_process_results({"question_id": 0, "answers": list(c["references"])}, [c["prediction"]])[
            "exact_match"
        ]
        for c in cases
    ]


def lmms_docvqa(cases: Cases) -> list[float]:
    metric = importlib.import_module("lmms_eval.api.metrics").anls
    return [metric(c["references"], [c["prediction"]])["anls"] for c in cases]


def lmms_chartqa(cases: Cases) -> list[float]:
    task = importlib.import_module("lmms_eval.tasks.chartqa.utils")
    documents = [{"type": "human_test", "answer": c["references"][0]} for c in cases]
    return [
        task.chartqa_process_results(d, [c["prediction"]])["relaxed_overall"]
        for d, c in zip(documents, cases, strict=True)
    ]


def lmms_pope(cases: Cases) -> list[float]:
    """Of all cases together: accuracy, precision, recall and F1."""
    task = importlib.import_module("lmms_eval.tasks.pope.utils")
    results = [
        task.pope_process_results({"question_id": n, "answer": c["references"][0]}, [c["prediction"]])
        for n, c in enumerate(cases)
    ]
    return [
        getattr(task, f"pope_aggregate_{name}")([r[f"pope_{name}"] for r in results])
        for name in ("accuracy", "precision", "recall", "f1_score")
    ]


def lmms_ocrbench(cases: Cases) -> list[float]:
    task = importlib.import_module("lmms_eval.tasks.ocrbench.utils")
    found = []
    for case in cases:
        dataset = "HME100k" if case["formula"] else "other"
        document = {"answer": case["references"], "dataset": dataset, "question_type": case["category"]}
        found.append(
            task.ocrbench_process_results(document, [case["prediction"]])["ocrbench_accuracy"]["score"]
        )
    return found


def refcoco(cases: Cases) -> list[float]:
    task = importlib.import_module("lmms_eval.tasks.refcoco.utils_rec")
    found = []
    for case in cases:
        box = task.parse_float_sequence_within(case["prediction"])
        found.append(float(task.compute_accuracy(case["box"], box)))
    return found


def lmms_mmbench(cases: Cases) -> list[float]:
    """Whether the letter that is read is right; what no letter can be read of is asked of no other model."""
    reader = importlib.import_module("lmms_eval.tasks.mmbench.mmbench_evals").MMBench_Evaluator()
    return [float(reader.can_infer(c["prediction"], dict(c["options"])) == c["references"][0]) for c in cases]


@functools.cache
def _folder() -> Path:
    """Of VLMEvalKit's package; asked before a part of it is imported."""
    return Path(importlib.util.find_spec("vlmeval").submodule_search_locations[0])


def _vlmeval(name: str) -> ModuleType:
    """A file of VLMEvalKit without its packages, which import every model and data set that the kit knows."""
    folder = _folder()
    parents = name.split(".")[:-1]
    for count in range(len(parents) + 1):
        package = ModuleType(".".join(("vlmeval", *parents[:count])))
        package.__path__ = [str(Path(folder, *parents[:count]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"vlmeval.{name}")


def _lines(cases: Cases, method: str, dataset: str) -> list[float]:
    kit = _vlmeval("dataset.utils.vqa_eval")
    lines = [{"answer": repr(c["references"]), "prediction": c["prediction"]} for c in cases]
    return [float(v) for v in kit.hit_calculate([kit.process_line(line, method) for line in lines], dataset)]


def vlm_vqa(cases: Cases) -> list[float]:
    return _lines(cases, "vqa_score", "TextVQA_VAL")


def vlm_docvqa(cases: Cases) -> list[float]:
    return _lines(cases, "anls", "DocVQA_VAL")


def vlm_chartqa(cases: Cases) -> list[float]:
    return _lines(cases, "relaxed_accuracy", "ChartQA_TEST")


def vlm_pope(cases: Cases) -> list[float]:
    """Of all cases together: accuracy, precision, recall and F1."""
    import pandas

    kit = _vlmeval("dataset.utils.yorn")
    said = [kit.YOrN_Extraction(c["prediction"]) for c in cases]
    truth = [c["references"][0].strip().capitalize() for c in cases]
    table = pandas.DataFrame(
        {"answer": truth, "extracted": said, "category": "all", "index": range(len(cases))}
    )
    table["score"] = table["answer"] == table["extracted"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "answers.tsv")
        table.to_csv(file, sep="\t", index=False)
        rated = kit.POPE_rating(str(file)).iloc[0]
    return [float(rated[name]) / 100 for name in ("acc", "precision", "recall", "Overall")]


def vlm_ocrbench(cases: Cases) -> list[float]:
    """The points are added up by category, so every case is a file of its own."""
    kit = _class(Path(_folder(), "dataset/image_vqa.py").read_text(), "OCRBench")
    found = []
    for case in cases:
        line = {
            "prediction": case["prediction"],
            "answer": repr(case["references"]),
            "category": case["category"],
        }
        found.append(float(kit.evaluate([line])["Final Score"]))
    return found


def _class(source: str, name: str) -> Any:
    """One class of a file, without what the file imports: the kit's text, compiled by itself."""
    import ast

    tree = ast.parse(source)
    (found,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name]

    class Table(list):
        iloc = property(lambda self: self)

    names: dict[str, Any] = {
        "ImageBaseDataset": object,
        "load": Table,
        "dump": lambda *_: None,
        "tqdm": lambda x: x,
        "get_intermediate_file_path": lambda *_: "",
    }
    exec(compile(ast.Module([found], []), name, "exec"), names)
    return names[name]


def vlm_mmbench(cases: Cases) -> list[float]:
    kit = _vlmeval("utils.matching_util")
    return [float(kit.can_infer(c["prediction"], dict(c["options"])) == c["references"][0]) for c in cases]


SCORES: dict[str, Callable[[Cases], list[float]]] = {
    "lmms_eval/vqav2": vqav2,
    "lmms_eval/textvqa": textvqa,
    "lmms_eval/docvqa": lmms_docvqa,
    "lmms_eval/chartqa": lmms_chartqa,
    "lmms_eval/pope": lmms_pope,
    "lmms_eval/ocrbench": lmms_ocrbench,
    "lmms_eval/refcoco": refcoco,
    "lmms_eval/mmbench": lmms_mmbench,
    "vlmevalkit/vqa": vlm_vqa,
    "vlmevalkit/docvqa": vlm_docvqa,
    "vlmevalkit/chartqa": vlm_chartqa,
    "vlmevalkit/pope": vlm_pope,
    "vlmevalkit/ocrbench": vlm_ocrbench,
    "vlmevalkit/mmbench": vlm_mmbench,
}
PACKAGES = {"lmms_eval": ("lmms_eval",), "vlmevalkit": ("vlmeval", "ms_vlmeval", "nvidia_vlmeval")}
MODULES = {"lmms_eval": "lmms_eval", "vlmevalkit": "vlmeval"}


def installed(kit: str) -> str:
    """The distribution of a kit and its version; empty where it is not installed."""
    if importlib.util.find_spec(MODULES[kit]) is None:
        return ""
    for name in PACKAGES[kit]:
        with contextlib.suppress(PackageNotFoundError):
            return f"{name} {version(name)}"
    return "a checkout"


def main() -> None:
    by_task: dict[str, Cases] = {}
    for case in json.load(sys.stdin):
        by_task.setdefault(case["task"], []).append(case)
    kits = {kit: installed(kit) for kit in MODULES}
    with contextlib.redirect_stdout(sys.stderr):
        scores = {
            task: SCORES[task](copy.deepcopy(cases))
            for task, cases in by_task.items()
            if kits[task.partition("/")[0]]
        }
    json.dump({"kits": {kit: name for kit, name in kits.items() if name}, "scores": scores}, sys.stdout)


if __name__ == "__main__":
    main()
