"""The page of an ablation, the same as Markdown, CSV, LaTeX, SVG and PDF; its answer as an exit status."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

from vl_jax.ablation import judgement, results
from vl_jax.ablation.judgement import Verdict
from vl_jax.ablation.results import Outcome, Results
from vl_jax.report import comparison, figure
from vl_jax.report.charts import absent, number, percent
from vl_jax.report.figure import ForestRow
from vl_jax.report.results import label
from vl_jax.report.row import better
from vl_jax.report.run import page
from vl_jax.report.tables import Cell, TextTable, mark_best, to_csv, to_html, to_latex, to_markdown
from vl_jax.runtime import disk
from vl_jax.runtime.errors import UserError

PAGE_FILE = "comparison.html"
# Columns of the arms where none are chosen: what is measured comes before them.
_COSTS = ("flops_per_token", "active_parameters", "step_ms", "peak_memory_mb", "wall_time_s")
_ROUTING = ("maxvio", "dead", "drop_rate", "entropy", "mutual_information")
_EXPECTED = {
    "lower": "lower",
    "higher": "higher",
    "not_lower": "not lower than by {}",
    "not_higher": "not higher than by {}",
    "open": "open",
}


def write(folder: Path, columns: Sequence[str] = ()) -> Results:
    """Writes ``comparison.html``, .md, .csv, .tex, .svg, .pdf and ``record.json`` from the files of the runs.

    Args:
      columns: patterns of the columns of the arms; empty: those of the plan, or the usual ones.

    Raises:
      UserError: the folder holds no ablation, or a pattern matches no figure.
      ValueError: a file of a run is damaged.
    """
    found = results.read(folder)
    answers, arms, runs = verdict_table(found), arm_table(found, columns), run_table(found)
    panels, title = draw(found), "Differences, arm minus baseline, with their intervals and pairs"
    drawing = figure.forest(panels, title=title)
    stored, done = found.stored, sum(o.status == "finished" for o in found.outcomes)
    svg = figure.to_svg(drawing)
    kinds = {arm.name: [o.files for o in found.of(arm.name) if o.files] for arm in stored.plan.arms}
    curves = comparison.charts({name: files for name, files in kinds.items() if files})
    said = f'<p class="note">{escape(stored.plan.says)}</p>' if stored.plan.says else ""
    drawn = figure.to_card(panels, title="Differences, arm minus baseline")
    answer = to_html(answers) + drawn if found.verdicts else absent("Nothing is claimed of these arms.")
    sections = [
        ("Answer", said + answer + _notes(found)),
        ("Arms", to_html(arms)),
        ("Training", curves),
        ("Runs", to_html(runs)),
        ("How it was done", _protocol(found)),
    ]
    total = len(found.outcomes)
    lead = f"{len(stored.plan.arms)} arms, {stored.plan.seeds} paired seeds, {done} of {total} runs finished"
    target = folder / PAGE_FILE
    disk.write_text(target, page(stored.name, lead, sections, kind="ablation"))
    text = f"# {stored.name}\n\n{lead}\n\n{to_markdown(answers)}\n{to_markdown(arms)}\n{to_markdown(runs)}"
    disk.write_text(target.with_suffix(".md"), text)
    disk.write_text(target.with_suffix(".csv"), to_csv(runs))
    disk.write_text(target.with_suffix(".tex"), to_latex(answers) + "\n" + to_latex(arms))
    disk.write_text(target.with_suffix(".svg"), svg)
    disk.write_bytes(target.with_suffix(".pdf"), figure.to_pdf(drawing))
    results.write_record(folder, found)
    return found


def conclude(folder: Path, columns: Sequence[str] = ()) -> None:
    """Writes the page, prints the answer, and fails if something declared did not come true.

    Raises:
      UserError: a declared direction did not hold, or runs failed; one line.
    """
    found = write(folder, columns)
    for verdict in found.verdicts:
        print(sentence(verdict, found.shares))
    where = folder / PAGE_FILE
    print(where)
    wrong = [v for v in found.verdicts if v.fails]
    refuse_failed(found, where)
    if wrong:
        said = "; ".join(f"{v.claim.name}: {v.word}" for v in wrong)
        declared = sum(v.claim.expected != "open" for v in found.verdicts)
        raise UserError(f"{len(wrong)} of {declared} declared directions did not hold ({said}); see {where}")


def refuse_failed(found: Results, where: Path) -> None:
    """Raises UserError, in one line, if a run failed; ``where`` is the page that says more."""
    failed = [o for o in (*found.outcomes, *found.trials) if o.status.startswith("failed")]
    if failed:
        first = failed[0]
        raise UserError(
            f"{len(failed)} of {len(found.outcomes) + len(found.trials)} runs failed, the first "
            f"{first.planned.folder} ({first.status.removeprefix('failed: ')}); see {where}"
        )


def sentence(verdict: Verdict, shares: set[str]) -> str:
    """A verdict in one line."""
    is_share = verdict.metric in shares
    effect = _effect(verdict, is_share)
    return (
        f"{verdict.claim.name}, {verdict.metric}: {effect}, p {_p(verdict.adjusted)} (Holm), "
        f"{verdict.pairs} pairs, expected {_expected(verdict, is_share)}: {verdict.word}"
    )


def verdict_table(found: Results) -> TextTable:
    """A row for every claim."""
    effect = f"effect [{100 * found.stored.plan.confidence:.3g} %]"
    head = ["claim", "verdict", "expected", "metric", effect, "p (Holm)", "p", "pairs"]
    rows = []
    for verdict in found.verdicts:
        is_share = verdict.metric in found.shares
        expected = _expected(verdict, is_share) + (" (said late)" if is_late(found, verdict) else "")
        rows.append(
            [
                Cell(verdict.claim.name),
                Cell(verdict.word, mood=_mood(verdict)),
                Cell(expected),
                Cell(verdict.metric),
                Cell(_effect(verdict, is_share), repr(verdict.effect.estimate)),
                Cell(_p(verdict.adjusted), repr(verdict.adjusted)),
                Cell(_p(verdict.p), repr(verdict.p)),
                Cell(f"{verdict.pairs} of {found.stored.plan.seeds}"),
            ]
        )
    return TextTable(head, rows, left=4)


def is_late(found: Results, verdict: Verdict) -> bool:
    """Whether a claim was first declared when runs were finished already."""
    claim = next(c for c in results.plans.to_json(found.stored.plan)["claims"] if _is(c, verdict))
    first = next(entry for entry in found.stored.declared if claim in entry["claims"])
    return bool(first["finished"])


def _is(claim: dict, verdict: Verdict) -> bool:
    given = verdict.claim
    return all(
        claim[name] == getattr(given, name) for name in ("arm", "baseline", "metric", "expected", "margin")
    )


def arm_table(found: Results, columns: Sequence[str] = ()) -> TextTable:
    """A row for each arm: means over seeds with half the width of their interval; the best marked."""
    plan, figures = found.stored.plan, {arm.name: found.of(arm.name) for arm in found.stored.plan.arms}
    known = list(dict.fromkeys(n for outs in figures.values() for o in outs for n in o.figures if n != "run"))
    patterns = list(columns) or list(plan.columns)
    names = comparison.choose(known, patterns) if patterns else _usual(found, known)
    ways = {n: way for n, name in enumerate(names) if (way := _better(found, name)) is not None}
    values = [
        [_mean([o.figures.get(name) for o in outs if o.status == "finished"]) for name in names]
        for outs in figures.values()
    ]
    best, rows = mark_best(ways, values), []
    for r, (arm, outs) in enumerate(figures.items()):
        done = [o for o in outs if o.status == "finished"]
        cells = [Cell(arm), Cell(f"{len(done)} of {len(outs)}")]
        for c, name in enumerate(names):
            figures_of_arm = [o.figures.get(name) for o in done]
            cells.append(comparison.spread(figures_of_arm, name in found.shares, (r, c) in best))
        rows.append(cells)
    return TextTable(["arm", "runs", *map(label, names)], rows)


def _usual(found: Results, known: Sequence[str]) -> list[str]:
    metrics = [found.stored.plan.metric, *(v.metric for v in found.verdicts)]
    held_out = [name for name in known if name.startswith("eval/") and name.endswith("/loss")]
    routing = [f"routing/{name}_mean" for name in _ROUTING]
    return [name for name in dict.fromkeys([*metrics, *held_out, *routing, *_COSTS]) if name in known]


def _better(found: Results, name: str) -> str | None:
    return found.stored.plan.better if name == found.stored.plan.metric else better(name, found.shares)


def _mean(values: Sequence[object]) -> float | None:
    known = [float(v) for v in values if isinstance(v, (int, float))]
    return sum(known) / len(known) if known else None


def run_table(found: Results) -> TextTable:
    """A row for every run, those that failed with their reason; seeds of an arm one below the other."""
    metrics = list(dict.fromkeys([found.stored.plan.metric, *(v.metric for v in found.verdicts)]))
    rows = [_run_row(outcome, metrics, found.shares) for outcome in (*found.outcomes, *found.trials)]
    return TextTable(["arm", "seed", "state", "commit", *map(label, metrics), "wall time s"], rows, left=4)


def _run_row(outcome: Outcome, metrics: Sequence[str], shares: set[str]) -> list[Cell]:
    planned, figures = outcome.planned, outcome.figures
    name = planned.arm + (f", candidate {planned.candidate}" if planned.candidate >= 0 else "")
    cells = [
        Cell(name),
        Cell(str(planned.seed)),
        Cell(
            outcome.status,
            link=f"{planned.folder}/report.html" if outcome.status == "finished" else "",
            mood="bad" if outcome.status.startswith("failed") else "",
        ),
        Cell(str(figures.get("commit", "")) or "–"),
    ]
    return cells + [comparison.spread([figures.get(m)], m in shares) for m in (*metrics, "wall_time_s")]


def draw(found: Results) -> list[figure.Panel]:
    """The effects of all claims by metric, each with its interval and its pairs."""
    rows: dict[str, list[ForestRow]] = {}
    for verdict in found.verdicts:
        arms = (found.of(name) for name in (verdict.claim.arm, verdict.claim.baseline))
        first, second = ({o.planned.seed: o.figures.get(verdict.metric) for o in outs} for outs in arms)
        both = ((first[seed], second.get(seed)) for seed in first if seed not in verdict.missing)
        pairs = [a - b for a, b in both if a is not None and b is not None]
        colour = {"good": figure.GOOD, "bad": figure.BAD}.get(_mood(verdict), figure.INK)
        said = f"{verdict.word}, p {_p(verdict.adjusted)}"
        row = ForestRow(verdict.claim.name, *verdict.effect, said, colour, tuple(pairs))
        rows.setdefault(verdict.metric, []).append(row)
    return [
        figure.Panel(metric, found_rows, percent if metric in found.shares else number)
        for metric, found_rows in rows.items()
    ]


def _notes(found: Results) -> str:
    lines = [f"{v.claim.name}: {note}." for v in found.verdicts for note in v.notes]
    lines += [f"{v.claim.name}, as it was said: {v.claim.says}" for v in found.verdicts if v.claim.says]
    lines += [
        f"{v.claim.name}: this was declared when runs were finished already."
        for v in found.verdicts
        if is_late(found, v)
    ]
    commits = sorted({str(o.figures["commit"]) for o in found.outcomes if o.figures.get("commit")})
    if len(commits) > 1:
        lines.append(f"The runs are of {len(commits)} commits: {', '.join(commits)}.")
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


def _protocol(found: Results) -> str:
    """What was declared, and how it is judged."""
    plan, stored = found.stored.plan, found.stored
    facts = [
        ("metric", f"{plan.metric}, {plan.better} is better"),
        ("seeds", f"{plan.seeds} from {plan.first_seed} on; the runs of one seed are a pair"),
        ("equal budget", f"{', '.join(plan.equal) or 'nothing'}, up to {100 * plan.tolerance:.3g} %"),
    ]
    for arm in plan.arms:
        cost = stored.costs.get(arm.name)
        if cost:
            text = f"{cost['steps']:,} steps, {cost['tokens']:,} tokens, {cost['parameters']:,} parameters"
            text += f" ({cost['active_parameters']:,} active), {number(cost['flops'])} flops"
            facts.append((f"cost of {arm.name}", text))
        count = len(plan.candidates(arm))
        tuned = f"{count} candidates x {plan.tuning_seeds} other seeds" if count > 1 else "none"
        if count > 1 and arm.name in stored.chosen:
            tuned += f"; taken: {dict(plan.candidates(arm)[stored.chosen[arm.name]]) or 'as it is'}"
        facts.append((f"tuning of {arm.name}", tuned))
    facts += [
        (
            f"declared {entry['date']}",
            f"commit {entry['commit'] or 'unknown'}, {entry['finished']} runs finished",
        )
        for entry in stored.declared
    ]
    facts.append(
        (
            "judged by",
            "the mean difference of pairs: p of the exact test over signs, two-sided, adjusted by Holm's "
            "method for all claims here, and Student's interval for one claim alone have to agree. The "
            "interval is of another seed on the same held-out samples, not of other samples. Runs that "
            "failed are not left out: their claim is incomplete.",
        )
    )
    body = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    return f'<div class="card"><dl class="facts">{body}</dl></div>'


def _expected(verdict: Verdict, is_share: bool) -> str:
    show = percent if is_share else number
    return _EXPECTED[verdict.claim.expected].format(show(verdict.claim.margin))


def _mood(verdict: Verdict) -> str:
    if verdict.claim.expected == "open":
        return ""
    return "good" if verdict.word == judgement.HELD else "bad"


def _effect(verdict: Verdict, is_share: bool) -> str:
    def show(value: float) -> str:
        if not math.isfinite(value):
            return "–"
        text = percent(abs(value)) if is_share else number(abs(value))
        return ("−" if value < 0 else "+") + text

    mean, low, high = verdict.effect
    return f"{show(mean)} [{show(low)}, {show(high)}]"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}".rstrip("0").rstrip(".")
