"""Runs published language models on recorded inputs and gives every value that was recorded of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vl_jax import params as params_lib
from vl_jax.interop import rules
from vl_jax.interop.language import (
    NAMES,
    LanguageConfig,
    Names,
    language_rules,
    language_stacks,
    read_language,
)
from vl_jax.language.decoder import Decoder, LayerContext
from vl_jax.language.mla import MLAConfig
from vl_jax.moe import balance
from vl_jax.moe.routing import RoutingContext, TokenChoice
from vl_jax.nn import cache as cache_lib
from vl_jax.nn import rope

Arrays = Mapping[str, np.ndarray]


class Language:
    """A decoder with the weights of a fixture."""

    def __init__(self, fixture: Any):
        self.config: LanguageConfig = read_language(fixture.config)
        self.decoder = Decoder(self.config.decoder, self.config.moe, None)
        names = NAMES.get(fixture.config["model_type"], Names())
        self.rules = language_rules(self.config.decoder, names)
        self.stacks = language_stacks(self.config.decoder)
        shapes = {"language": abstract_params(self.decoder)}
        if self.config.moe.scheme == "loss_free":
            sparse = len(self.config.decoder.sparse_layers)
            shape = (sparse, self.config.moe.num_experts)
            shapes["routing"] = {"bias": jax.ShapeDtypeStruct(shape, jnp.float32)}
        tree = rules.read(self.plan(shapes), fixture.weights, shapes)
        self.params, self.state = tree["language"], tree.get("routing", {})

    def plan(self, tree: Any) -> rules.Plan:
        shapes = {path: tuple(leaf.shape) for path, leaf in params_lib.flatten(tree).items()}
        return rules.plan(self.rules, shapes, self.stacks)

    def forward(
        self, params: Any, tokens: jax.Array, keys: jax.Array, cache: Any = None
    ) -> tuple[tuple, Any]:
        """((hidden, logits, cache), intermediates) for tokens [B T]; ``keys`` [B T] may be attended to.

        Without a cache intermediates are what every module gave, else None.
        """
        length = tokens.shape[1]
        if cache is None:
            causal = jnp.tril(jnp.ones((length, length), bool))
            mask, positions = causal & (keys > 0)[:, None, :], jnp.arange(length)
        else:
            mask = cache_lib.causal_mask(cache, jnp.ones_like(tokens))
            positions = jnp.arange(length) + cache.length
        context = LayerContext(
            positions=jnp.broadcast_to(positions, tokens.shape),
            mask=mask,
            routing=routed_everywhere(tokens.shape),
            vision=None,
            vision_mask=None,
            length=None if cache is None else cache.length,
        )

        def run(decoder: Decoder) -> tuple:
            hidden, _, kept, _ = decoder(decoder.embed(tokens), context, self.state, cache)
            new = None if cache is None else cache_lib.append(cache, kept, jnp.ones_like(tokens))
            return hidden, decoder.logits(hidden), new

        if cache is not None:
            return self.decoder.apply({"params": params}, method=run), None  # pyright: ignore
        return self.decoder.apply(
            {"params": params}, method=run, mutable=["intermediates"], capture_intermediates=True
        )  # pyright: ignore[reportReturnType]

    def empty_cache(self, slots: int) -> Any:
        d = self.config.decoder
        return cache_lib.create(
            runs=[len(run.layers) for run in d.runs],
            batch=1,
            slots=slots,
            kept=d.attention.kept,
            dtype=jnp.float32,
        )


def abstract_params(decoder: Decoder) -> Any:
    tokens = jnp.zeros((1, 2), jnp.int32)
    context = LayerContext(
        positions=tokens,
        mask=jnp.ones((1, 2, 2), bool),
        routing=RoutingContext(tokens == 0, tokens),
        vision=None,
        vision_mask=None,
        length=None,
    )
    sparse, experts = len(decoder.config.sparse_layers), decoder.moe.num_experts
    state = {"bias": jnp.zeros((sparse, experts))} if decoder.moe.scheme == "loss_free" else {}

    def touch(module: Decoder) -> jax.Array:
        return module.logits(module(module.embed(tokens), context, state, None)[0])

    boxed = jax.eval_shape(lambda: decoder.init(jax.random.key(0), method=touch)["params"])
    return jax.tree.map(lambda b: b.value, boxed, is_leaf=lambda b: hasattr(b, "value"))


def run(fixture: Any) -> dict[str, Any]:
    """Every recorded value of a causal language model."""
    model, arrays = Language(fixture), fixture.arrays
    tokens, keys = (np.asarray(arrays[name]) for name in ("in_input_ids", "in_attention_mask"))
    weight = fixture.config.get("router_aux_loss_coef", 0.0) if "out_aux_loss" in arrays else 0.0

    def loss(params: Any) -> tuple[jax.Array, tuple]:
        (hidden, logits, _), captured = model.forward(params, jnp.asarray(tokens), jnp.asarray(keys))
        captured = looked_at(captured["intermediates"])
        total, routers = cross_entropy(logits, jnp.asarray(arrays["in_labels"])), {}
        if model.config.decoder.sparse_layers:
            routers = router_losses(Seen(model, captured).router_logits(), keys, top_k=model.config.moe.top_k)
        if weight:
            total = total + weight * routers["out_aux_loss"]
        return total, (hidden, logits, captured, routers)

    gradient, (hidden, logits, captured, routers), found = training(loss, model.params)
    found |= {"out_logits": logits, **routers}
    found["out_loss"] = found["out_objective"] = found["out_train_losses"][0]
    seen, embedded = Seen(model, captured), np.asarray(model.params["embedding"])[tokens]
    found |= seen.layers(embedded, hidden)
    ends = {"model.embed_tokens": embedded, "model.norm": hidden}
    for name in arrays:
        module = name.removeprefix("mid/")
        if module != name:
            value = ends[module] if module in ends else seen.submodule(module, arrays[name].shape)
            if value is not None:
                found[name] = np.asarray(value).reshape(arrays[name].shape)
    exported = rules.export(model.plan({"language": gradient}), {"language": gradient})
    return found | {f"grad/{key}": array for key, array in exported} | decoding(model, arrays)


def router_losses(logits: jax.Array, keys: np.ndarray, *, top_k: int) -> dict[str, jax.Array]:
    """What was recorded of the routers' logits [L B T E]."""

    def pooled(valid: Any) -> jax.Array:
        return balance.pooled_loss(logits, jnp.broadcast_to(valid, logits.shape[:-1]), top_k=top_k)

    over_keys = pooled(keys > 0)
    return {
        "out_aux_loss": over_keys,
        "out_aux_lb_masked": over_keys,
        "out_aux_lb_all_tokens": pooled(np.ones_like(keys, bool)),
        "out_aux_router_z": jnp.mean(jax.nn.logsumexp(logits, axis=-1) ** 2, axis=(1, 2)),
    }


class Seen:
    """What the layers showed on the way, looked up by layer number."""

    def __init__(self, model: Language, captured: Any):
        self.config = model.config
        self.flat = {path: first_of(leaf) for path, leaf in params_lib.flatten(captured).items()}
        self.place = {
            layer: (run.name, i) for run in model.config.decoder.runs for i, layer in enumerate(run.layers)
        }

    def __call__(self, layer: int, path: str) -> Any:
        name, index = self.place[layer]
        for full in (f"{name}/{path}", f"{name}/{path}/__call__".replace("//", "/")):
            if full in self.flat:
                return jax.tree.map(lambda a: a[index], self.flat[full])
        return None

    def choice(self, layer: int) -> TokenChoice:
        return self(layer, "moe/assignment")

    def router_logits(self) -> jax.Array:
        """[L B T E] of the sparse layers."""
        return jnp.stack([self(i, "moe/logits") for i in self.config.decoder.sparse_layers])

    def layers(self, embedded: Any, hidden: Any) -> dict[str, Any]:
        count = self.config.decoder.num_layers
        states = [embedded, *(self(i, "__call__") for i in range(count - 1)), hidden]
        found = {f"out_hidden_states.{i}": state for i, state in enumerate(states)}
        found |= {f"out_attentions.{i}": self(i, "attention/weights") for i in range(count)}
        for i, layer in enumerate(self.config.decoder.sparse_layers):
            logits = self(layer, "moe/logits")
            found[f"out_router_logits.{i}"] = logits.reshape(-1, logits.shape[-1])
        return found

    def submodule(self, name: str, shape: tuple[int, ...]) -> Any:
        """The output of a module of the recorded model, or None if it is not known here."""
        if rotary := re.fullmatch(r"model\.rotary_emb(?:\.([01]))?", name):
            return self._rotary(shape, rotary.group(1))
        match = re.fullmatch(r"model\.layers\.(\d+)(?:\.(.*))?", name)
        if not match:
            return None
        layer, rest = int(match.group(1)), match.group(2) or ""
        if router := re.fullmatch(r"mlp\.(?:gate|router)(?:\.([012]))?|mlp\.(1)", rest):
            which = router.group(1) or router.group(2) or "0"
            choice = self.choice(layer)
            return (self(layer, "moe/logits"), choice.gates, choice.experts)[int(which)]
        for path in PATHS.get(rest, ()):
            if (value := self(layer, path)) is not None:
                return value
        return None

    def _rotary(self, shape: tuple[int, ...], which: str | None) -> Any:
        """Cosines (0) and sines (1), of each pair once or twice; or both as a complex number."""
        attention = self.config.decoder.attention
        dim = attention.qk_rope_dim if isinstance(attention, MLAConfig) else attention.head_dim
        angles = jax.jit(lambda: rope.angles(jnp.arange(shape[1])[None], dim=dim, config=attention.rope))
        angle = np.asarray(angles())
        both = np.stack([np.cos(angle), np.sin(angle)]) * attention.rope.amplitude
        if which is None:
            return np.moveaxis(both, 0, -1)
        one = both[int(which)]
        return one if shape[-1] == one.shape[-1] else np.concatenate([one, one], axis=-1)


# Module of the recorded model below a layer -> places among ours, the first that exists.
PATHS: dict[str, tuple[str, ...]] = {
    "": ("__call__",),
    "input_layernorm": ("attention_norm",),
    "post_attention_layernorm": ("mlp_norm",),
    "self_attn.0": ("attention",),
    "self_attn.1": ("attention/weights",),
    "self_attn.q_proj": ("attention/projected_query",),
    "self_attn.q_a_proj": ("attention/query_down",),
    "self_attn.q_a_layernorm": ("attention/query_norm",),
    "self_attn.q_b_proj": ("attention/projected_query",),
    "self_attn.kv_a_proj_with_mqa": ("attention/kv_down",),
    "self_attn.kv_a_layernorm": ("attention/kv_norm",),
    "self_attn.kv_b_proj": ("attention/key_value",),
    "self_attn.q_norm": ("attention/query_norm",),
    "self_attn.k_norm": ("attention/key_norm",),
    "mlp": ("mlp", "moe"),
    "mlp.0": ("moe",),
    "mlp.experts": ("moe/routed",),
    "mlp.shared_experts": ("moe/shared",),
    "mlp.shared_expert": ("moe/shared",),
    "mlp.shared_expert_gate": ("moe/shared_gate",),
}


# What is looked at of a layer, by the end of its path.
ENDS = {
    "__call__",
    "attention/weights",
    "moe/logits",
    "moe/assignment",
    *(p for ps in PATHS.values() for p in ps),
}


def looked_at(captured: Any) -> Any:
    """The part of what was captured that ``Seen`` looks up: the less is shown, the smaller the program."""
    flat = params_lib.flatten(captured)
    ends = {path: path.partition("/")[2].removesuffix("/__call__") for path in flat}
    return params_lib.unflatten({path: (first_of(flat[path]),) for path, end in ends.items() if end in ENDS})


def routed_everywhere(shape: tuple[int, ...]) -> RoutingContext:
    """All tokens are routed, padding too, as in the recorded models."""
    return RoutingContext(jnp.ones(shape, bool), jnp.zeros(shape, jnp.int32))


def first_of(leaf: Any) -> Any:
    """A captured value: modules may return a tuple, whose first member is their output."""
    value = leaf[0]
    return value[0] if isinstance(value, tuple) else value


@jax.jit
def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Position t against label t + 1, mean over labels that are not -100."""
    wanted = labels[:, 1:]
    scores = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], jnp.maximum(wanted, 0))
    valid = wanted != -100
    return jnp.sum(jnp.where(valid, scores, 0)) / jnp.sum(valid, dtype=scores.dtype)


def training(
    loss: Callable[[Any], tuple[jax.Array, Any]], params: Any, steps: int = 4
) -> tuple[Any, Any, dict[str, np.ndarray]]:
    """The first gradient, what the loss gives beside its value, and losses and norms of the recorded recipe.

    That is clipping at a norm of 1, and AdamW (arXiv 1711.05101) at 2e-3 with a decay of 0.1 on every
    parameter. Only the gradient is compiled; the recipe is plain arithmetic.
    """
    rate, decay, epsilon, (b1, b2) = 2e-3, 0.1, 1e-8, (0.9, 0.95)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    leaves, shape = jax.tree.flatten(jax.device_get(params))
    first, second = ([np.zeros_like(leaf) for leaf in leaves] for _ in range(2))
    shown, values, norms = None, [], []
    for step in range(1, steps + 1):
        (value, aux), gradient = jax.device_get(run(jax.tree.unflatten(shape, leaves)))
        shown = shown or (gradient, aux)
        gradients = jax.tree.leaves(gradient)
        norm = float(np.sqrt(sum(np.sum(np.square(g, dtype=np.float64)) for g in gradients)))
        gradients = [g / max(norm, 1.0) for g in gradients]
        first = [b1 * m + (1 - b1) * g for m, g in zip(first, gradients, strict=True)]
        second = [b2 * v + (1 - b2) * g**2 for v, g in zip(second, gradients, strict=True)]
        leaves = [
            p - rate * (m / (1 - b1**step) / (np.sqrt(v / (1 - b2**step)) + epsilon) + decay * p)
            for p, m, v in zip(leaves, first, second, strict=True)
        ]
        values.append(value)
        norms.append(norm)
    found = {"out_train_losses": np.array(values), "out_train_grad_norms": np.array(norms, np.float32)}
    return *shown, found


def decoding(model: Language, arrays: Arrays) -> dict[str, Any]:
    """Logits token by token over the cache, and greedy continuation of the first row."""
    if "in_decode_input_ids" not in arrays:
        return {}
    tokens, prefill = np.asarray(arrays["in_decode_input_ids"]), int(arrays["out_decode_prefill_len"])
    new = arrays["out_greedy_tokens"].shape[1]

    @jax.jit
    def append(params: Any, tokens: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        (_, logits, cache), _ = model.forward(params, tokens, tokens, cache)
        return logits[:, -1], cache

    length = tokens.shape[1]
    logits, cache = append(model.params, tokens[:, :prefill], model.empty_cache(length + new))
    steps = [logits]  # of the next position, beginning with the one after the prefill
    for i in range(prefill, length):
        logits, cache = append(model.params, tokens[:, i : i + 1], cache)
        steps.append(logits)
    greedy = []
    for _ in range(new):
        greedy.append(np.argmax(logits, axis=-1))
        logits, cache = append(model.params, greedy[-1][:, None], cache)
    recorded = arrays["out_decode_logits"]
    return {
        "out_decode_logits": np.stack(steps, axis=1).reshape(recorded.shape),
        "out_greedy_tokens": np.stack(greedy, axis=1),
    }
