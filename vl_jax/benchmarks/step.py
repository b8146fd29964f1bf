"""How fast a training step and decoding are on a CPU, beside ``transformers`` with the same weights.

    this process --.-- process of ours ----.  one action after the other, in turns:
                   '-- process of theirs --'  action -> (value, CPU seconds, wall seconds)

Ours writes its fresh parameters as a published checkpoint, theirs loads it, and both have to give the same
losses or logits before anything is timed. Each side has a process and one thread to itself, on the same core,
with the memory allocator that its users have: ``python -m vl_jax`` sets ours up, theirs is as it is found.
Ratios are of CPU time, which other work on the machine disturbs least, and of neighbouring turns. Without
torch and transformers ours runs alone.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from vl_jax.runtime import allocator

OURS, THEIRS = "ours", "theirs"
PACKAGES = ("jax", "flax", "optax", "numpy", "torch", "transformers")

# ``config.json`` of the model that is measured: 11 million parameters, 6 million of them used by a token.
MODEL: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": None,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "max_position_embeddings": 4096,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of what is measured. Ids are random; of an untrained model, so are the experts chosen."""

    model: Mapping[str, Any] = dataclasses.field(default_factory=lambda: MODEL)
    rows: int = 4  # of a training step
    length: int = 512
    prompt: int = 31  # decoding is of one row; with its new tokens, one more of a stream, it fills 256 slots
    new_tokens: int = 224
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    checked: int = 3  # steps whose losses are compared, before the first one timed

    @property
    def tokens(self) -> np.ndarray:
        """i64[rows, length + 1]."""
        shape = (self.rows, max(self.length + 1, self.prompt))
        return np.random.default_rng(0).integers(1, self.model["vocab_size"], shape)


@dataclasses.dataclass(frozen=True)
class Action:
    """Something to time: ``run(prepare())``, of which only ``run`` counts."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None


# Name of a benchmark to the unit of its figures and what they are divided by: a step, or a token.
UNITS = {"step": "seconds per step", "decode": "tokens per second"}


def run(name: str, *, repeats: int = 9, json_file: Path | None = None, case: Case | None = None) -> dict:
    """Measures, prints a table and returns the figures.

    Args:
      name: ``step``, a training step with AdamW; or ``decode``, one row token by token over a cache.
      repeats: turns of each side; medians are reported, with the lowest and the highest.
      json_file: where the figures go too.

    Raises:
      ValueError: the name is not known, there are no repeats, or the two sides disagree.
    """
    if name not in UNITS:
        raise ValueError(f"benchmark {name!r}: known are {', '.join(UNITS)}")
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: must be at least 1")
    case = case or Case()
    result: dict[str, Any] = {"benchmark": name, "unit": UNITS[name], "repeats": repeats}
    result |= {"case": dataclasses.asdict(case), "machine": machine()}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model"
        sides = {OURS: stack.enter_context(Side(_OURS[name], case, folder))}
        if missing := [p for p in ("torch", "transformers") if importlib.util.find_spec(p) is None]:
            print(f"{' and '.join(missing)} cannot be imported: only our side is measured")
            sides[OURS].do("check")
        else:
            with allocator.as_found():
                sides[THEIRS] = stack.enter_context(Side(_THEIRS[name], case, folder))
            values = {side: process.do("check")[0] for side, process in sides.items()}
            result["check"] = compare(values[OURS], values[THEIRS])
        timed = measure(sides, repeats)
    units = case.new_tokens if name == "decode" else 1
    result["measured"] = {
        side: {action: _summary(name, turns, units) for action, turns in actions.items()}
        for side, actions in timed.items()
    }
    if THEIRS in timed:
        result["ratios"] = _ratios(name, timed)
    print(table(result))
    if json_file is not None:
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def machine() -> dict[str, Any]:
    """Where the figures come from."""
    installed = [p for p in PACKAGES if importlib.util.find_spec(p) is not None]
    names = Path("/proc/cpuinfo")
    lines = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in installed},
    }


class Side:
    """One side's process: ``do`` has it perform an action."""

    def __init__(self, build: Callable[[Case, Path], dict[str, Action]], case: Case, folder: Path):
        context = multiprocessing.get_context("spawn")  # a fresh interpreter: nothing of this one is shared
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, case, folder), daemon=True)

    def __enter__(self) -> Side:
        self._process.start()
        self.actions: list[str] = self._receive()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join(10)
        self._process.kill()

    def do(self, action: str) -> tuple[Any, float, float]:
        """(value, CPU seconds, wall seconds) of an action.

        Raises:
          RuntimeError: it failed there.
        """
        self._pipe.send(action)
        return self._receive()

    def _receive(self) -> Any:
        while not self._pipe.poll(1.0):
            if not self._process.is_alive():
                raise RuntimeError(f"a process of the benchmark ended with {self._process.exitcode}")
        answer = self._pipe.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"a process of the benchmark failed: {answer}")
        return answer


def _serve(pipe: Connection, build: Callable[[Case, Path], dict[str, Action]], case: Case, folder: Path):
    """What runs in the process of a side, until it is ended."""
    if hasattr(os, "sched_setaffinity"):  # one core: no library starts a second thread then
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    try:
        actions = build(case, folder)
        pipe.send([name for name in actions if name != "check"])
        while True:
            action = actions[pipe.recv()]
            argument = action.prepare()
            cpu, wall = time.process_time(), time.perf_counter()
            value = action.run(argument)
            pipe.send((value, time.process_time() - cpu, time.perf_counter() - wall))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        raise


def compare(ours: Any, theirs: Any, *, tolerance: float = 1e-4) -> dict[str, Any]:
    """How far the two sides' numbers are apart, relative to the largest of them.

    Raises:
      ValueError: further than the tolerance, which leaves room for other orders of addition in float32.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    difference = float(np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs)))
    if not difference <= tolerance:
        raise ValueError(f"ours and transformers differ by {difference:.1e}, more than {tolerance:.0e}")
    return {"numbers": ours.size, "difference": difference, "tolerance": tolerance}


Turns = list[tuple[float, float]]  # (CPU seconds, wall seconds) of each


def measure(sides: Mapping[str, Side], repeats: int) -> dict[str, dict[str, Turns]]:
    """Every action of every side in turns, after one turn that is not counted (it compiles)."""
    timed: dict[str, dict[str, Turns]] = {s: {a: [] for a in side.actions} for s, side in sides.items()}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            for action, turns in timed[name].items():
                _, cpu, wall = side.do(action)
                if turn:
                    turns.append((cpu, wall))
    return timed


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _summary(name: str, turns: Turns, units: int) -> dict[str, dict[str, float]]:
    clocks = dict(zip(("cpu", "wall"), zip(*turns, strict=True), strict=True))
    if name == "decode":
        return {clock: spread([units / s for s in seconds]) for clock, seconds in clocks.items()}
    return {clock: spread([s / units for s in seconds]) for clock, seconds in clocks.items()}


def _ratios(name: str, timed: Mapping[str, Mapping[str, Turns]]) -> dict[str, dict[str, float]]:
    """Per action of ours: CPU time, or speed, over that of their faster way in the same turn."""
    fastest = [min(cpu for cpu, _ in turn) for turn in zip(*timed[THEIRS].values(), strict=True)]
    ratios = {}
    for action, turns in timed[OURS].items():
        shares = [cpu / best for (cpu, _), best in zip(turns, fastest, strict=True)]
        ratios[action] = spread([1 / s for s in shares] if name == "decode" else shares)
    return ratios


def table(result: Mapping[str, Any]) -> str:
    """The figures as text: medians, and in brackets the lowest and the highest."""

    def cell(spread: Mapping[str, float]) -> str:
        digits = 1 if result["benchmark"] == "decode" else 3
        return "{median:.{d}f} ({lowest:.{d}f} - {highest:.{d}f})".format(**spread, d=digits)

    lines = [f"{result['unit']}, median (lowest - highest) of {result['repeats']} turns, one thread"]
    lines.append(f"{'':22}{'CPU time':28}wall time")
    for side, actions in result["measured"].items():
        name = side if side == OURS else "transformers"
        for action, clocks in actions.items():
            lines.append(f"{name:14}{action:8}{cell(clocks['cpu']):28}{cell(clocks['wall'])}")
    what = "speed" if result["benchmark"] == "decode" else "CPU time"
    for action, spread in result.get("ratios", {}).items():
        values = "{median:.2f} ({lowest:.2f} - {highest:.2f})".format(**spread)
        lines.append(f"{what} of {action}, ours / transformers: {values}")
    if "check" in result:
        lines.append(
            "both gave the same numbers: largest relative difference {difference:.1e}".format(
                **result["check"]
            )
        )
    return "\n".join(lines)


def text_model(case: Case) -> tuple[Any, Any, Any]:
    """(layout, parameters, routing state) of a case, on one device."""
    import jax

    from vl_jax.interop.language import read_language
    from vl_jax.layout import init_params, plan_layout
    from vl_jax.model import VisionLanguageConfig
    from vl_jax.moe import stacks
    from vl_jax.sharding import MeshConfig, make_mesh

    allocator.keep_freed_memory()  # as ``train`` does
    language = read_language(case.model)
    # A few layers are quicker on a CPU without a scan, which copies what each reads and keeps.
    decoder = dataclasses.replace(language.decoder, scan_layers=False)
    # transformers does not balance the load either.
    balance = dataclasses.replace(language.moe.balance, bias_rate=0.0)
    moe = dataclasses.replace(language.moe, balance=balance)
    config = VisionLanguageConfig(encoder=None, language=decoder, moe=moe)
    example = config.smallest_batch(1)
    layout = plan_layout(config, example, make_mesh(MeshConfig(), devices=jax.devices()[:1]))
    return layout, init_params(layout, example, seed=0), stacks.init_state(config.stacks)


def _our_model(case: Case, folder: Path) -> tuple[Any, Any, Any]:
    """``text_model``, written to the folder for the other side."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    from vl_jax import params as params_lib
    from vl_jax.interop import rules
    from vl_jax.interop.folder import write_folder
    from vl_jax.interop.language import language_rules, language_stacks
    from vl_jax.model import LANGUAGE

    layout, params, state = text_model(case)
    decoder = layout.model.config.language
    of_decoder = state.get(LANGUAGE, {})
    tree = {**params, **({"routing": of_decoder} if of_decoder else {})}
    shapes = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(tree).items()}
    plan = rules.plan(language_rules(decoder), shapes, language_stacks(decoder))
    write_folder(folder, case.model, rules.layout(plan, tree), rules.export(plan, tree))
    return layout, params, state


def text_batch(config: Any, tokens: np.ndarray, targets: np.ndarray | None = None) -> Any:
    """A batch of text rows, all of whose tokens are predicted if targets are given."""
    ids = tokens.astype(np.int32)
    order = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    predicted = order if targets is not None else order[:, :1]
    return dataclasses.replace(
        config.smallest_batch(len(ids)),
        tokens=ids,
        positions=order,
        segment_ids=np.ones_like(ids),
        branch_ids=np.zeros_like(ids),
        visual_slot=np.full_like(ids, -1),
        target_index=predicted,
        targets=np.zeros_like(predicted) if targets is None else targets.astype(np.int32),
        loss_weights=np.ones(predicted.shape, np.float32),
    )


def _our_step(case: Case, folder: Path) -> dict[str, Action]:
    layout, params, state = _our_model(case, folder)
    import jax
    import jax.numpy as jnp

    from vl_jax import params as params_lib
    from vl_jax import sharding
    from vl_jax.layout import put_batch
    from vl_jax.roles import ORDINARY
    from vl_jax.train.optimizer import OptimizerConfig, make_optimizer
    from vl_jax.train.step import TrainState, make_train_step

    paths = set(params_lib.flatten(params))
    config = OptimizerConfig(
        learning_rate=case.learning_rate,
        schedule="constant",
        betas=case.betas,
        weight_decay=case.weight_decay,
        clip_norm=case.clip_norm,
    )
    optimizer = make_optimizer(config, paths, dict.fromkeys(paths, ORDINARY))  # theirs decays everything
    tokens = case.tokens[:, : case.length + 1]
    batch = put_batch(text_batch(layout.model.config, tokens[:, :-1], tokens[:, 1:]), layout)
    step = jax.jit(make_train_step(layout.model, optimizer, trainable=paths), donate_argnums=0)
    train = TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), state)

    def advance(_: Any) -> float:
        nonlocal train
        with sharding.use_mesh(layout.mesh, layout.rules):
            train, metrics = step(train, batch, case.learning_rate)
        jax.block_until_ready(train)
        return float(metrics["loss"])

    return {"check": Action(lambda _: [advance(_) for _ in range(case.checked)]), "step": Action(advance)}


def _their_model(folder: Path) -> Any:
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
    from transformers.utils import logging  # pyright: ignore[reportMissingImports]

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _their_step(case: Case, folder: Path) -> dict[str, Action]:
    import torch  # pyright: ignore[reportMissingImports]

    model = _their_model(folder).train()
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=case.learning_rate,
        betas=case.betas,
        weight_decay=case.weight_decay,
        fused=True,
    )
    tokens = torch.from_numpy(case.tokens[:, : case.length + 1])

    def advance(_: Any) -> float:
        optimizer.zero_grad()
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), case.clip_norm)
        optimizer.step()
        return loss.item()

    return {"check": Action(lambda _: [advance(_) for _ in range(case.checked)]), "step": Action(advance)}


def _our_decode(case: Case, folder: Path) -> dict[str, Action]:
    layout, params, state = _our_model(case, folder)
    import jax

    from vl_jax import sharding
    from vl_jax.generation.choice import GenerationConfig, choose
    from vl_jax.generation.decode import decode, prefill
    from vl_jax.generation.generate import generate, stream
    from vl_jax.layout import put_batch

    model, stop = layout.model, (-1,)
    batch = put_batch(text_batch(model.config, case.tokens[:1, : case.prompt]), layout)

    def begun(tokens: int) -> Any:
        """A stream that has given its first token: so many are left."""
        config = GenerationConfig(max_new_tokens=tokens + 1)
        with sharding.use_mesh(layout.mesh, layout.rules):
            rows = stream(params, state, batch, model=model, config=config, stop=stop)
            next(rows)
        return rows

    def rest(rows: Any) -> list[int]:
        with sharding.use_mesh(layout.mesh, layout.rules):
            return [token for (token,) in rows]

    def loop(_: Any) -> np.ndarray:
        config = GenerationConfig(max_new_tokens=case.new_tokens)
        with sharding.use_mesh(layout.mesh, layout.rules):
            tokens = generate(params, state, batch, model=model, config=config, stop=stop)
        return np.asarray(tokens)[0]

    def check(_: Any) -> np.ndarray:
        """Logits that follow the prompt, and a few tokens later."""
        slots = case.prompt + case.checked

        def first_and_last() -> tuple[jax.Array, jax.Array]:
            first, cache, vision = prefill(params, state, batch, model=model, slots=slots, chunk=None)
            last = first
            for index in range(case.checked):
                token = choose(last, None, config=GenerationConfig())
                last, cache = decode(params, state, batch, vision, token, index, cache, model=model)
            return first, last

        with sharding.use_mesh(layout.mesh, layout.rules):
            return np.concatenate(jax.jit(first_and_last)())

    return {
        "check": Action(check),
        "calls": Action(rest, lambda: begun(case.new_tokens)),
        "loop": Action(loop),
    }


def _their_decode(case: Case, folder: Path) -> dict[str, Action]:
    import torch  # pyright: ignore[reportMissingImports]

    model = _their_model(folder).eval()
    tokens = torch.from_numpy(case.tokens[:1, : case.prompt])

    @torch.no_grad()
    def start() -> Any:
        return model(input_ids=tokens, use_cache=True)

    @torch.no_grad()
    def calls(output: Any, tokens: int = case.new_tokens) -> np.ndarray:
        first = output.logits[:, -1]
        for _ in range(tokens):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            token.item()
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return torch.cat([first, output.logits[:, -1]]).numpy()

    def loop(_: Any) -> None:
        model.generate(
            tokens, max_new_tokens=case.new_tokens, min_new_tokens=case.new_tokens, do_sample=False
        )

    return {
        "check": Action(lambda output: calls(output, case.checked), start),
        "calls": Action(calls, start),
        "loop": Action(loop),
    }


_OURS = {"step": _our_step, "decode": _our_decode}
_THEIRS = {"step": _their_step, "decode": _their_decode}
