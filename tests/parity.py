"""Parity: every array recorded from a reference implementation, against what this package computes.

Fixtures are found under a root by the files in a folder, whatever it is called:

    config.json, model.safetensors, io.npz, meta.json (, grads.safetensors)   a model of transformers
    config.json, model.safetensors, lm_text.npz, *.npz                        a DeepSeek-VL2 model
    config.json, model.safetensors, io.npz                                    its vision encoder alone
    configs.json, <case>.npz, <case>.safetensors                              its projector alone, per case
    rope.json, rope.npz                                                       its rotary embedding alone
    cases.json, processor_config.json, *.npz, cases/*.npz                     its processor

A runner is a function from a ``Fixture`` to arrays under the names they were recorded by. An array that it
does not give is a failure: nothing passes by being left out. This file is also a pytest plugin, which prints
the table; ``-v`` prints all of it, and VL_JAX_PARITY_TABLE=path writes all of it to a file.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.interop.folder import open_weights, read_config
from vl_jax.interop.safetensors import open_file

Arrays = Mapping[str, np.ndarray]
Tolerance = tuple[float, float]  # absolute, and relative to the recorded value

# Who computes what: model class to "module:function". The classes of the parts of DeepSeek-VL2 are ours.
VL2_MODEL, VL2_VISION, VL2_PROJECTOR = (
    "DeepseekVLV2ForCausalLM",
    "DeepseekVLV2Vision",
    "DeepseekVLV2Projector",
)
VL2_ROPE, VL2_PROCESSOR = "DeepseekVLV2Rope", "DeepseekVLV2Processor"
RUNNERS: dict[str, str] = {
    VL2_MODEL: "parity_deepseek_vl2:run",
    VL2_VISION: "parity_deepseek_vl2_parts:run_vision",
    VL2_PROJECTOR: "parity_deepseek_vl2_parts:run_projector",
    VL2_ROPE: "parity_deepseek_vl2_parts:run_rope",
    VL2_PROCESSOR: "parity_processor:run",
    **dict.fromkeys(
        (
            "DeepseekV2ForCausalLM",
            "DeepseekV3ForCausalLM",
            "MixtralForCausalLM",
            "Qwen2MoeForCausalLM",
            "OlmoeForCausalLM",
            "GptOssForCausalLM",
        ),
        "parity_language:run",
    ),
    **dict.fromkeys(("SiglipVisionModel", "ViTModel"), "parity_vision:run_vision"),
    **dict.fromkeys(("SiglipModel", "CLIPModel"), "parity_vision:run_pair"),
    "SamVisionModel": "parity_conv:run",
    "ResNetModel": "parity_conv:run",
    "SwinModel": "parity_swin:run",
    "VideoMAEForPreTraining": "parity_video:run",
    "SwitchTransformersForConditionalGeneration": "parity_switch:run",
    "BertForPreTraining": "parity_words:run_bert",
    "TransfoXLLMHeadModel": "parity_words:run_transformer_xl",
    "Wav2Vec2ForCTC": "parity_sound:run",
    "DeepseekVLForConditionalGeneration": "parity_vision_language:run",
    "DeepseekVLHybridForConditionalGeneration": "parity_vision_language:run",
    "LlavaForConditionalGeneration": "parity_vision_language:run",
}

# What the two READMEs of the recordings say, as patterns of array names.
HF_NOT_COMPARED = r"in_.*|out_\w+_f64|out_decode_prefill_len|out_decode_vs_full_maxdiff|out_greedy_min_margin"
VL2_NOT_COMPARED = {
    VL2_MODEL: (
        r"lm_\w+/(input_ids|attention_mask|position_ids|prefill_len)"
        r"|train_\w+/(input_ids|alpha|seq_aux)|vlm_\w+/attention_mask"
    ),
    VL2_VISION: r"io/(images|attn_pool_unused_reference)",
    VL2_PROJECTOR: r".*/x",
    VL2_ROPE: r".*_(q_in|k_in|positions)",
    VL2_PROCESSOR: r"(?!)",
}
ATTENDED, SCALED = r".*/(gate\d+_topk_weight_sorted|attn_layer\d+)", 2e-5
VL2_TOLERANCES: tuple[tuple[str, Tolerance], ...] = (
    (r"rope/.*", (1e-6, 0.0)),
    (r".*/images", (1e-6, 0.0)),
    (r".*/y", (1e-5, 0.0)),
    (r"io/.*|.*/(vision_features|projector_out|inputs_embeds)", (2e-5, 0.0)),
    (ATTENDED, (1e-5, 0.0)),
    (r".*/(hidden_\d+|gate\d+_in|moe\d+_out|cache_\w+|\w*logits\w*)", (1e-4, 1e-4)),
    (r".*/(loss|loss_ce)", (1e-5, 0.0)),
    (r".*/aux_loss_layer\d+", (1e-6, 0.0)),
    (r".*/grad:.*", (1e-4, 1e-3)),
)


class Recorded(Mapping[str, np.ndarray]):
    """Arrays of several files, each loaded when it is asked for; no file stays open."""

    def __init__(self):
        self._load: dict[str, Callable[[], np.ndarray]] = {}

    def add(self, arrays: Arrays, prefix: str = "") -> Recorded:
        """Adds the arrays of an open file under ``prefix + name``."""
        self._load |= {f"{prefix}{name}": functools.partial(arrays.__getitem__, name) for name in arrays}
        return self

    def add_file(self, path: Path, prefix: str = "") -> Recorded:
        """Adds the arrays of an ``.npz`` file under ``prefix + name``."""

        def load(name: str) -> np.ndarray:
            with np.load(path) as arrays:
                return arrays[name]

        with np.load(path) as arrays:
            self._load |= {f"{prefix}{name}": functools.partial(load, name) for name in arrays.files}
        return self

    def __getitem__(self, name: str) -> np.ndarray:
        return self._load[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._load)

    def __len__(self) -> int:
        return len(self._load)


@dataclasses.dataclass(frozen=True)
class Fixture:
    """One recording. ``arrays`` has inputs and results, gradients among them as ``grad/<key>``.

    Arrays of DeepSeek-VL2 are called ``<file stem>/<array>``.
    """

    name: str
    model_class: str
    folder: Path
    config: Mapping[str, Any]
    arrays: Arrays
    not_compared: str  # pattern of the names of inputs and of notes about the recording
    tolerance: Callable[[str, np.ndarray], Tolerance | None]
    load_weights: Callable[[], Arrays] = dict
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    processor: Path | None = None  # folder of the processor's cases, inputs of a DeepSeek-VL2 model

    @functools.cached_property
    def weights(self) -> Arrays:
        return self.load_weights()


# Finding fixtures.


def discover(root: Path) -> list[Fixture]:
    """All fixtures at or below a folder, in the order of their names."""
    found: list[Fixture] = []
    for parent, _, files in os.walk(root):
        folder, held = Path(parent), set(files)
        for needed, make in LAYOUTS:
            if needed <= held:
                found += make(root, folder)
                break
        if {"rope.json", "rope.npz"} <= held:
            found.append(_rope(root, folder))
    return sorted(found, key=lambda fixture: fixture.name)


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.name


def _hf_model(root: Path, folder: Path) -> Iterator[Fixture]:
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    arrays = Recorded().add_file(folder / "io.npz")
    if (folder / "grads.safetensors").is_file():
        arrays.add(open_file(folder / "grads.safetensors"), "grad/")

    def tolerance(name: str, recorded: np.ndarray) -> Tolerance | None:
        if name.startswith("grad/"):
            return 1e-4 * float(np.abs(recorded).max(initial=0)) + 1e-6, 0.0
        absolute = meta["arrays"].get(name, {}).get("tol_abs")
        return None if absolute is None else (absolute, 0.0)

    yield Fixture(
        _name(root, folder),
        meta["model_class"],
        folder,
        read_config(folder),
        arrays,
        HF_NOT_COMPARED,
        tolerance,
        functools.partial(open_weights, folder),
        meta,
    )


def _vl2_tolerance(name: str, recorded: np.ndarray, *, config: Mapping[str, Any]) -> Tolerance | None:
    language = config.get("language_config", {})
    if (
        re.fullmatch(ATTENDED, name)
        # Unless normalised, the weights of the experts go up to this factor.
        and (language.get("routed_scaling_factor") or 1.0) > 1.0
        and not language.get("norm_topk_prob")
    ):
        return SCALED, 0.0
    return next((limit for pattern, limit in VL2_TOLERANCES if re.fullmatch(pattern, name)), None)


def _vl2(
    model_class: str,
    name: str,
    folder: Path,
    config: Mapping[str, Any],
    files: Sequence[Path],
    **options: Any,
) -> Fixture:
    arrays = Recorded()
    for path in files:
        arrays.add_file(path, f"{path.stem}/")
    tolerance = functools.partial(_vl2_tolerance, config=config)
    return Fixture(
        name, model_class, folder, config, arrays, VL2_NOT_COMPARED[model_class], tolerance, **options
    )


def _vl2_model(root: Path, folder: Path) -> Iterator[Fixture]:
    above = [p for p in folder.parents if p.is_relative_to(root)]
    yield _vl2(
        VL2_MODEL,
        _name(root, folder),
        folder,
        read_config(folder),
        sorted(folder.glob("*.npz")),
        load_weights=functools.partial(open_weights, folder),
        processor=next((cases.parent for p in above for cases in sorted(p.glob("*/cases.json"))), None),
    )


def _vision(root: Path, folder: Path) -> Iterator[Fixture]:
    load = functools.partial(open_weights, folder)
    config, files = read_config(folder), [folder / "io.npz"]
    yield _vl2(VL2_VISION, _name(root, folder), folder, config, files, load_weights=load)


def _projector(root: Path, folder: Path) -> Iterator[Fixture]:
    configs = json.loads((folder / "configs.json").read_text(encoding="utf-8"))
    for case, config in configs.items():
        load = functools.partial(open_file, folder / f"{case}.safetensors")
        name, files = _name(root, folder / case), [folder / f"{case}.npz"]
        yield _vl2(VL2_PROJECTOR, name, folder, config, files, load_weights=load)


def _rope(root: Path, folder: Path) -> Fixture:
    config = json.loads((folder / "rope.json").read_text(encoding="utf-8"))
    return _vl2(VL2_ROPE, _name(root, folder / "rope"), folder, config, [folder / "rope.npz"])


def _processor(root: Path, folder: Path) -> Iterator[Fixture]:
    config = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    files = [*sorted(folder.glob("*.npz")), *sorted((folder / "cases").glob("*.npz"))]
    yield _vl2(VL2_PROCESSOR, _name(root, folder), folder, config, files, processor=folder)


# The first whose files are all there decides what a folder is.
MODEL_FILES = {"config.json", "model.safetensors"}
LAYOUTS: tuple[tuple[set[str], Callable[[Path, Path], Iterator[Fixture]]], ...] = (
    (MODEL_FILES | {"io.npz", "meta.json"}, _hf_model),
    (MODEL_FILES | {"lm_text.npz"}, _vl2_model),
    (MODEL_FILES | {"io.npz"}, _vision),
    ({"configs.json"}, _projector),
    ({"cases.json", "processor_config.json"}, _processor),
)


# Comparing.


@dataclasses.dataclass(frozen=True)
class Row:
    """One recorded array against the computed one; ``problem`` is empty where they agree."""

    array: str
    error: float
    tolerance: float  # where error / tolerance is largest
    problem: str = ""

    @property
    def ratio(self) -> float:
        return self.error / self.tolerance if self.tolerance else float("inf") if self.error else 0.0


def compare(fixture: Fixture, computed: Mapping[str, Any]) -> list[Row]:
    """A row for every recorded array that is neither input nor note."""
    expert_of = _expert_indices(fixture.arrays)
    rows = []
    for name in fixture.arrays:
        if re.fullmatch(fixture.not_compared, name):
            continue
        if name not in computed:
            rows.append(Row(name, float("inf"), 0.0, "not computed"))
            continue
        recorded, value = np.asarray(fixture.arrays[name]), np.asarray(computed[name])
        if value.shape != recorded.shape:
            rows.append(Row(name, float("inf"), 0.0, f"shape {value.shape}, recorded {recorded.shape}"))
            continue
        experts = expert_of.get(name)
        if experts is not None:
            recorded = _by_expert(recorded, fixture.arrays[experts])
            value = _by_expert(value, np.asarray(computed.get(experts, fixture.arrays[experts])))
        valid = _valid(fixture, name, recorded)
        rows.append(_row(fixture, name, recorded[valid], value[valid]))
    return rows


def _row(fixture: Fixture, name: str, recorded: np.ndarray, value: np.ndarray) -> Row:
    exact = recorded.dtype.kind in "biu"
    limit = (0.0, 0.0) if exact else fixture.tolerance(name, recorded)
    if limit is None:
        return Row(name, float("inf"), 0.0, "no tolerance is known")
    if not recorded.size:
        return Row(name, 0.0, limit[0])
    recorded, value = recorded.astype(np.float64), value.astype(np.float64)
    same = (recorded == value) | (np.isnan(recorded) & np.isnan(value))
    with np.errstate(all="ignore"):
        error = np.where(same, 0.0, np.nan_to_num(np.abs(value - recorded), nan=np.inf, posinf=np.inf))
        tolerance = np.where(np.isfinite(recorded), limit[0] + limit[1] * np.abs(recorded), 0.0)
        excess = np.where(same, 0.0, error / tolerance)
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    wrong = int((~(error <= tolerance)).sum())  # so written that a tolerance that is no number fails
    problem = f"{wrong} of {error.size} values {'differ' if exact else 'above tolerance'}" if wrong else ""
    return Row(name, float(error[worst]), float(tolerance[worst]), problem)


def _expert_indices(arrays: Arrays) -> dict[str, str]:
    """For arrays ordered by choice of expert, the name of the indices: choices are a set, in no order.

    A Hugging Face router gives (logits, weights, indices); a block may give its router's weights again.
    """
    result: dict[str, str] = {}
    for name in arrays:
        if vl2 := re.fullmatch(r"(.*/gate\d+)_topk_idx_sorted", name):
            result |= {name: name, f"{vl2[1]}_topk_weight_sorted": name}
        elif hf := re.fullmatch(r"(mid/.*)\.2", name):
            indices, weights = arrays[name], f"{hf[1]}.1"
            if indices.dtype.kind == "i" and weights in arrays and arrays[weights].shape == indices.shape:
                again = f"{hf[1].rpartition('.')[0]}.1"
                others = [n for n in (weights, again) if n in arrays and arrays[n].shape == indices.shape]
                result |= dict.fromkeys((name, *others), name)
    return result


def _by_expert(values: np.ndarray, experts: np.ndarray) -> np.ndarray:
    if experts.shape != values.shape:
        return values
    return np.take_along_axis(values, np.argsort(experts, axis=-1), axis=-1)


def _valid(fixture: Fixture, name: str, recorded: np.ndarray) -> Any:
    """Index of the values that mean something: not those at positions masked by the recording's own input."""
    mask = f"{name.rpartition('/')[0]}/attention_mask"
    if mask in fixture.arrays and re.fullmatch(fixture.not_compared, mask):
        attended = fixture.arrays[mask] != 0
        if recorded.shape[: attended.ndim] == attended.shape:
            return attended
    return ...


# Running, and the table.

AGREES, DIFFERS, RAISED, NOT_SUPPORTED = "ok", "FAILED", "RAISED", "not yet supported"


@dataclasses.dataclass(frozen=True)
class Result:
    """How one fixture went."""

    fixture: str
    model_class: str
    status: str
    rows: tuple[Row, ...] = ()

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.problem]

    def summary(self) -> str:
        """One line: how many arrays, and the one nearest to its tolerance or farthest beyond it."""
        line = f"{self.fixture:<55} {self.model_class:<44} {self.status}"
        if not self.rows:
            return line
        worst = max(self.rows, key=lambda row: row.ratio)
        failed = f"{len(self.failures)} of " if self.failures else ""
        return (
            f"{line}  {failed}{len(self.rows)} arrays, worst {worst.ratio:.3g} x tolerance at {worst.array}"
        )

    def lines(self, rows: Sequence[Row]) -> list[str]:
        return [
            f"{self.fixture:<55} {r.array:<60} {r.error:>9.2e} {r.tolerance:>9.2e} {r.problem or 'ok'}"
            for r in rows
        ]


def check(fixture: Fixture, *, runners: Mapping[str, str] = RUNNERS) -> Result:
    """Runs a fixture and compares; a runner's own exception goes through."""
    name = runners.get(fixture.model_class)
    if name is None:
        return Result(fixture.name, fixture.model_class, NOT_SUPPORTED)
    module, _, function = name.partition(":")
    rows = tuple(compare(fixture, getattr(importlib.import_module(module), function)(fixture)))
    status = DIFFERS if any(row.problem for row in rows) else AGREES
    return Result(fixture.name, fixture.model_class, status, rows)


# Reports of tests travel from worker processes with their ``user_properties``, which must be plain values.
PROPERTY = "parity"


def pack(result: Result) -> tuple[str, dict[str, Any]]:
    """A result as an entry of ``user_properties``."""
    return PROPERTY, dataclasses.asdict(result)


def unpack(value: Mapping[str, Any]) -> Result:
    """The inverse of ``pack``."""
    return Result(**{**value, "rows": tuple(Row(**row) for row in value["rows"])})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the table of all fixtures that ran."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    found = [
        unpack(value)
        for report in reports
        if getattr(report, "when", None) == "call"
        for key, value in report.user_properties
        if key == PROPERTY
    ]
    if not found:
        return
    found.sort(key=lambda result: result.fixture)
    table = [line for result in found for line in result.lines(result.rows)]
    summaries = [result.summary() for result in found]
    if path := os.environ.get("VL_JAX_PARITY_TABLE"):
        Path(path).write_text("\n".join([*summaries, "", *table, ""]), encoding="utf-8")
    terminalreporter.section("parity with recorded values")
    details = [line for result in found for line in result.lines(result.failures)]
    for line in [*(table if terminalreporter.verbosity > 0 else details), *summaries]:
        terminalreporter.write_line(line)
    counts = collections.Counter(result.status for result in found)
    arrays = sum(len(result.rows) for result in found)
    counted = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    terminalreporter.write_line(f"{len(found)} fixtures: {counted}; {arrays} arrays compared")
