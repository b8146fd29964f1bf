"""``inspect routing``: a trained model's routing, and what other routes would cost, on one page.

Writes ``routing.html`` and ``routing.json`` into the folder of the run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from vl_jax.batch import MODALITIES, Batch
from vl_jax.data.encode import make_encoder
from vl_jax.data.text.tokenizer import Tokenizer
from vl_jax.evaluate.capacity import capacity_curve
from vl_jax.evaluate.interventions import Study, study
from vl_jax.evaluate.routes import all_routes, churn
from vl_jax.experiment import Experiment, model_spec, open_stream
from vl_jax.layout import Layout
from vl_jax.moe import balance
from vl_jax.moe.stacks import Stacks
from vl_jax.report.charts import heatmap, number, percent
from vl_jax.report.load import scale
from vl_jax.report.run import page
from vl_jax.runs import restore
from vl_jax.train.step import TrainState

PAGE_FILE, FIGURES_FILE = "routing.html", "routing.json"


def write_routing(
    workdir: Path,
    *,
    num_batches: int,
    overrides: Sequence[tuple[str, str]] = (),
    capacity: bool = False,
) -> Path:
    """Studies the newest checkpoint of a run on its held-out sources; returns the path of the page.

    Args:
      num_batches: how many batches of the last stage's size.
      overrides: changes to the run's config, of which ``data`` is the useful part: another dataset.
      capacity: also measures the loss with other numbers of slots, each of which is compiled anew.

    Raises:
      ValueError: the folder holds no run, or the model has no experts or predicts no tokens.
    """
    experiment, layout, state, step = restore(workdir, overrides)
    experiment = _held_out(experiment)
    stream = open_stream(experiment, experiment.stages[-1])
    try:
        batches = [next(stream) for _ in range(num_batches)]
    finally:
        stream.close()
    parts: Stacks = layout.model.config.stacks
    if not parts:
        raise ValueError(f"{workdir}: the model has no routed experts")
    if not hasattr(layout.model, "logits"):
        kind = type(experiment.model).__name__
        raise ValueError(f"{workdir}: its model, a {kind}, predicts no tokens: there is no loss to change")
    tokenizer = make_encoder(experiment.data, model_spec(experiment)).tokenizer
    changed = _churn(workdir, overrides, layout, state, batches, step)
    screen = Console(stderr=True)
    figures, sections, lead = {}, [], ""
    for stack in parts:
        title = stack if len(parts) > 1 else ""

        def shown(plan: Iterable[Any], title: str = title) -> Iterable[Any]:
            return track(list(plan), f"interventions {title}".rstrip(), console=screen)

        found = study(
            layout,
            state.params,
            state.routing,
            batches,
            stack=stack,
            track=shown,
            collections=state.collections,
        )
        lead = f"step {step:,}: {found.targets:,} targets of held-out data, loss {found.loss:.4f} nats"
        churned = changed and {"since_step": changed["since_step"], "share": changed["share"][stack]}
        figures[stack] = {**_figures(found), "churn": churned}
        if capacity:
            given = (layout, state.params, state.routing, batches)
            curve = capacity_curve(*given, stack=stack, collections=state.collections)
            figures[stack]["capacity"] = {str(factor): loss for factor, loss in curve.items()}
        texts = [_texts(change, batches[change.batch], tokenizer) for change in found.changes]
        of_stack = _sections(found, texts, churned)
        if figures[stack].get("capacity"):
            of_stack.append(("Capacity at test time", _capacity(figures[stack]["capacity"])))
        sections += [(f"{title}: {name}" if title else name, body) for name, body in of_stack]
    main, *others = parts
    written = {
        "step": step,
        "stack": main,
        **figures[main],
        "other_stacks": {name: figures[name] for name in others},
    }
    (workdir / FIGURES_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    target = workdir / PAGE_FILE
    target.write_text(page(f"{workdir.resolve().name}: routing", lead, sections), encoding="utf-8")
    return target


def _churn(
    workdir: Path,
    overrides: Sequence[tuple[str, str]],
    layout: Layout,
    state: TrainState,
    batches: Sequence[Batch],
    step: int,
) -> dict[str, Any] | None:
    """By stack the choices that changed since the checkpoint before; None without one, or without choices."""
    try:
        _, _, earlier, since = restore(workdir, overrides, before=step)
    except ValueError:
        return None
    try:
        before, after = (
            all_routes(layout, s.params, s.routing, batches, collections=s.collections)
            for s in (earlier, state)
        )
    except ValueError:  # tokens of a stack have no choices
        return None
    share = {
        name: churn(
            jnp.asarray(before[name]), jnp.asarray(after[name]), num_experts=stack.moe.num_experts
        ).tolist()
        for name, stack in layout.model.config.stacks.items()
    }
    return {"since_step": since, "share": share}


def _held_out(experiment: Experiment) -> Experiment:
    """The experiment, to be read from its held-out sources in the manner of its last stage."""
    data = dataclasses.replace(
        experiment.data, sources=experiment.data.evaluation or experiment.data.sources, image_dropout_rate=0.0
    )
    stage = dataclasses.replace(experiment.stages[-1], sources=(), weights=())
    return dataclasses.replace(experiment, data=data, stages=(stage,))


def _figures(found: Study) -> dict[str, Any]:
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name != "changes"}
    shards = balance.fan_out_shards(found.load.shape[-1])
    values["fan_out_shards"] = list(shards[: found.fan_out.shape[1]])
    values |= {n: getattr(found, n) for n in ("marginal_entropy", "modality_information")}
    lists = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()}
    return {**lists, "changes": [dataclasses.asdict(change) for change in found.changes]}


def _sections(
    found: Study, texts: Sequence[tuple[str, str]], changed: dict[str, Any] | None
) -> list[tuple[str, str]]:
    names = [f"layer {layer}" for layer in found.layers]
    load = "".join(
        _card(
            f"Load of {name} tokens",
            _relative(found.load[:, m]),
            scale("even share", "no token"),
            numbers=found.layers,
        )
        for m, name in enumerate(MODALITIES)
        if found.load[:, m].any()
    )
    harm = found.knockout - found.loss
    knockout = _card(
        "Loss without one expert",
        _relative(np.maximum(harm, 0.0)),
        '<p class="note">How much the loss rises when the expert is taken away and its tokens go to their '
        "next best one, as a multiple of the mean over experts of the layer.</p>"
        + scale("mean of the layer", "no harm"),
        numbers=found.layers,
    )
    pairs = "".join(
        _card(
            f"Chosen together, {name}",
            _lift(found.choices[i]),
            scale("independent choice", "never"),
            row_name="expert",
        )
        for i, name in enumerate(names)
        if found.choices.shape[-1] > 1
    )
    return [
        ("Load", f'<div class="grid">{load}</div>'),
        ("By layer", _by_layer(found, names, changed)),
        ("Knock-out", f'<div class="grid">{knockout}</div>'),
        ("Forced routes", _changes(found, names, texts)),
        ("Co-activation", f'<div class="grid">{pairs}</div>'),
    ]


def _card(
    title: str,
    rows: Sequence[Sequence[float | None]],
    said: str,
    row_name: str = "layer",
    numbers: Sequence[int] = (),
) -> str:
    chart = heatmap(rows, title=title, row_name=row_name, numbers=numbers)
    return f'<div class="card"><h3>{escape(title)}</h3>{said}{chart}</div>'


def _relative(values: np.ndarray) -> list[list[float | None]]:
    """Every row as multiples of its mean."""
    means = values.mean(axis=-1, keepdims=True)
    return [[float(v / m) if m > 0 else None for v in row] for row, (m,) in zip(values, means, strict=True)]


def _lift(together: np.ndarray) -> list[list[float | None]]:
    """How much more often two experts are chosen together than independent choices would be; [E E]."""
    alone = np.diagonal(together)
    pairs = together.sum() - alone.sum()
    expected = np.outer(alone, alone)
    np.fill_diagonal(expected, 0.0)
    expected = expected * (pairs / max(expected.sum(), 1e-30))
    size = len(alone)
    return [
        [
            float(together[i, j] / expected[i, j]) if i != j and expected[i, j] > 0 else None
            for j in range(size)
        ]
        for i in range(size)
    ]


def _by_layer(found: Study, names: Sequence[str], changed: dict[str, Any] | None) -> str:
    rows = {
        "loss, first choice of every token taken away": [number(v) for v in found.rerouted],
        "loss, worst single expert taken away": [number(v) for v in found.knockout.max(axis=-1)],
        "the worst expert": [str(e) for e in found.knockout.argmax(axis=-1)],
        "experts without a token": [str(int(n)) for n in (found.load.sum(axis=1) == 0).sum(axis=-1)],
        "expert and modality: mutual information, nats": [number(v) for v in found.modality_information],
    }
    for m, modality in enumerate(MODALITIES):
        rows[f"router entropy, {modality} tokens, nats"] = [number(v) for v in found.router_entropy[:, m]]
        rows[f"entropy of the load, {modality}, nats"] = [number(v) for v in found.marginal_entropy[:, m]]
    shards_of = balance.fan_out_shards(found.load.shape[-1])[: found.fan_out.shape[1]]
    for i, shards in enumerate(shards_of):
        if shards > 1:
            rows[f"of {shards} shards, those a token is sent to"] = [number(v) for v in found.fan_out[:, i]]
    if changed is not None:
        rows[f"choices that changed since step {changed['since_step']}"] = [
            percent(v) for v in changed["share"]
        ]
    head = "<th></th>" + "".join(f'<th class="num">{n}</th>' for n in names)
    body = "".join(
        f"<tr><th>{label}</th>{''.join(f'<td class=num>{v}</td>' for v in values)}</tr>"
        for label, values in rows.items()
    )
    return _table(head, body)


def _capacity(curve: dict[str, float]) -> str:
    note = "Loss where every expert has so many slots, over the mean load; what finds none is dropped."
    head = "<th></th>" + "".join(f'<th class="num">{escape(factor)}</th>' for factor in curve)
    body = "".join(f'<td class="num">{loss:.4f}</td>' for loss in curve.values())
    return f'<p class="note">{note}</p>{_table(head, f"<tr><th>loss, nats</th>{body}</tr>")}'


def _changes(found: Study, names: Sequence[str], texts: Sequence[tuple[str, str]]) -> str:
    note = (
        "Every token's first choice in one layer taken away, so that its next best expert comes in: the "
        "targets that were then predicted worst."
    )
    columns = ("after", "target", "layer", "first choice", "loss", "rerouted")
    head = "".join(f"<th>{c}</th>" for c in columns)
    body = ""
    for change, (before, target) in zip(found.changes, texts, strict=True):
        cells = (
            before,
            target,
            names[change.layer],
            f"expert {change.expert}",
            number(change.loss),
            number(change.rerouted_loss),
        )
        body += "<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>"
    return f'<p class="note">{note}</p>{_table(head, body)}'


def _table(head: str, body: str) -> str:
    table = f'<table class="comparison"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="card wide"><div class="scroll">{table}</div></div>'


def _texts(change: Any, batch: Any, tokenizer: Tokenizer) -> tuple[str, str]:
    """The last words that the predicting token sees, and the target."""
    tokens = np.asarray(batch.tokens[change.row, : change.position + 1])
    visible = batch.branch_ids[change.row, : change.position + 1]
    same = (visible == 0) | (visible == visible[-1])
    text = same & (batch.visual_slot[change.row, : change.position + 1] < 0)
    words = tokenizer.decode(tokens[text][-12:].tolist(), skip_special=True)
    return words.strip(), tokenizer.decode([change.target])
