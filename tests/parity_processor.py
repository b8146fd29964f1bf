"""Runs the processor and the image processors on recorded inputs and gives every value recorded of them."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.data.images.pixels import read_image_processor
from vl_jax.data.images.tiling import DEFAULT_GRIDS, best_grid, num_visual_tokens
from vl_jax.data.published.processor import Processor, ProcessorConfig, Record
from vl_jax.data.published.request import Request
from vl_jax.data.text.tokenizer import ASSISTANT, BOS, IMAGE, SPECIAL, USER

# One case, and the grids, are of the published sizes; the other cases are cut for small tiles.
PUBLISHED_TILE, PUBLISHED_PATCH, PUBLISHED_RATIO = 384, 14, 2


def run(fixture: Any) -> dict[str, Any]:
    """Every array recorded of the published processor, as ``<case>/<array>``."""
    folder, recorded = fixture.processor, fixture.arrays
    processor = Processor.load(folder, tokenizer=folder / "tokenizer")
    records = _records(processor, folder)
    values: dict[str, Any] = {}
    for name, record in records.items():
        fields = dataclasses.asdict(record)
        fields["target_ids"] = fields.pop("labels")
        values |= {f"{name}/{key}": value for key, value in fields.items()}
    for name in sorted({n.partition("/")[0] for n in recorded if n.endswith("/seq_lens")}):
        # A batch does not name its cases: they are known by the ids of its rows.
        rows = zip(recorded[f"{name}/input_ids"], recorded[f"{name}/attention_mask"], strict=True)
        members = [_same_ids(records.values(), row[mask != 0]) for row, mask in rows]
        side = "left" if name.endswith("left") else "right"
        batch = dataclasses.asdict(processor.collate(members, padding=side))
        values |= {f"{name}/{key}": value for key, value in batch.items()}
    return values | _published_sizes(processor, folder, recorded)


def recorded_notes(folder: Path) -> dict[str, Any]:
    """What is recorded of the published processor in other files than arrays."""
    notes: dict[str, Any] = {case["name"]: case["sft_format"] for case in _read(folder / "cases.json")}
    for name in ("best", "best_ext18", "n_image_tokens"):
        notes[name] = [case[name] for case in _read(folder / "best_resolution_384.json")["cases"]]
    notes["special_token_ids"] = _read(folder / "special_token_ids.json")
    notes["tokenizer_cases"] = [case["ids"] for case in _read(folder / "tokenizer_cases.json")]
    return notes


def run_notes(folder: Path) -> dict[str, Any]:
    """Our values for ``recorded_notes``."""
    processor = Processor.load(folder, tokenizer=folder / "tokenizer")
    notes: dict[str, Any] = {name: r.sft_format for name, r in _records(processor, folder).items()}
    tokenizer = processor.tokenizer
    ids = {s: tokenizer.token_id(s) for s in SPECIAL} | {"len_tokenizer": tokenizer.vocab_size}
    texts = [case["text"] for case in _read(folder / "tokenizer_cases.json")]
    notes["special_token_ids"] = ids
    notes["tokenizer_cases"] = [tokenizer.encode(text, allowed=SPECIAL) for text in texts]
    return notes | _grids(_read(folder / "best_resolution_384.json"))


def image_processor_outputs(fixture: Any) -> dict[str, np.ndarray]:
    """``out_proc<j>_image<i>_<name>`` for every image processor and picture of a fixture, [1 3 h w]."""
    arrays, values = fixture.arrays, {}
    images = [arrays[f"in_proc_image{i}"] for i in _indices(arrays, "in_proc_image{}")]
    for j in _indices(arrays, "in_proc{}_settings_json"):
        processor = read_image_processor(json.loads(bytes(arrays[f"in_proc{j}_settings_json"])))
        for i, image in enumerate(images):
            for name, view in processor(image).items():
                values[f"out_proc{j}_image{i}_{name}"] = view.transpose(2, 0, 1)[None]
    return values


def _indices(arrays: Any, pattern: str) -> list[int]:
    return list(itertools.takewhile(lambda i: pattern.format(i) in arrays, itertools.count()))


def _records(processor: Processor, folder: Path) -> dict[str, Record]:
    return {case["name"]: _record(processor, folder, case) for case in _read(folder / "cases.json")}


def _record(processor: Processor, folder: Path, case: dict[str, Any]) -> Record:
    call = case["call"]
    request = Request(
        conversation=call.get("conversations") or (),
        prompt=call.get("prompt"),
        images=[folder / "images" / f"{name}.png" for name in case["images"]],
        inference=call.get("inference_mode", True),
        wrap_prompt=call.get("apply_sft_format", False),
        mask_prompt=case["mask_prompt"],
        system_prompt=call.get("system_prompt", ""),
    )
    return processor.record(request)


def _same_ids(records: Iterable[Record], ids: np.ndarray) -> Record:
    return next(r for r in records if np.array_equal(r.input_ids, ids))


def _published_sizes(processor: Processor, folder: Path, recorded: Any) -> dict[str, Any]:
    """The case at the published tile size. Its question is recorded as ids only, and read from those."""
    if "real384/input_ids" not in recorded:
        return {}
    ids, visual = recorded["real384/input_ids"], recorded["real384/images_seq_mask"]
    before, after = (processor.tokenizer.decode(part.tolist()) for part in _around(ids, visual))
    question = before.removeprefix(f"{BOS}{USER}: ") + IMAGE + after.removesuffix(f"\n\n{ASSISTANT}:")
    config = dataclasses.replace(
        processor.config,
        candidate_resolutions=_pixels(DEFAULT_GRIDS),
        patch_size=PUBLISHED_PATCH,
        downsample_ratio=PUBLISHED_RATIO,
    )
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": ""}]
    request = Request(messages, images=[folder / "images" / "real384.png"])
    record = dataclasses.replace(processor, config=config).record(request)
    levels = np.rint((record.images * 0.5 + 0.5) * 255).astype(np.uint8)
    values = dataclasses.asdict(record) | {"tiles_uint8": levels}
    return {f"real384/{name}": value for name, value in values.items()}


def _around(ids: np.ndarray, visual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids before and after the only image."""
    where = np.flatnonzero(visual)
    return ids[: where[0]], ids[where[-1] + 1 :]


def _grids(stored: dict[str, Any]) -> dict[str, Any]:
    published = ProcessorConfig(_pixels(stored["candidates_grid_w_h"]), PUBLISHED_PATCH, PUBLISHED_RATIO)
    wide = dataclasses.replace(published, candidate_resolutions=tuple(map(tuple, stored["candidates_ext18"])))
    sizes = [case["size"] for case in stored["cases"]]
    grids = {
        name: [best_grid(*size, config.tiling()) for size in sizes]
        for name, config in (("best", published), ("best_ext18", wide))
    }
    side = published.tile_tokens_side
    counts = [num_visual_tokens(g, tile_tokens_side=side, views="global_local") for g in grids["best"]]
    return {name: [list(size) for size in _pixels(g)] for name, g in grids.items()} | {
        "n_image_tokens": counts
    }


def _pixels(grids: Iterable[Any]) -> tuple[tuple[int, int], ...]:
    return tuple((PUBLISHED_TILE * across, PUBLISHED_TILE * down) for across, down in grids)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
