"""What is likely wrong where a property of a scheme does not hold, and what to do about it."""

from __future__ import annotations

# Property: (likely cause, remedy).
ADVICE: dict[str, tuple[str, str]] = {
    "it runs": (
        "an error in the scheme's own code; a misspelt entry of the state or an option is the commonest",
        "correct the line that is named",
    ),
    "shapes and dtypes are right": (
        "route returns something else than (assignment, losses), or arrays of other shapes or dtypes",
        "return a TokenChoice of int32[T, K] and float32[T, K] or another assignment, and a dict of scalars",
    ),
    "ids in range": (
        "ids below 0, or above num_experts; only the id num_experts means unused",
        "write jnp.where(used, experts, config.num_experts)",
    ),
    "ids distinct per token": (
        "a token's choices are made one by one and do not know each other",
        "choose them together, by best(scores, config.top_k, context), or set repeats to num_experts",
    ),
    "weights and losses are finite": (
        "a division by a sum that can be zero, a logarithm of zero, or an exponential that overflows",
        "add 1e-20 to the divisor, and mask values before the logarithm, not behind it",
    ),
    "weights are not negative": (
        "gates are logits, or a difference",
        "pass them through a softmax, sigmoid or ReLU",
    ),
    "padding chooses nothing": (
        "context.valid is not looked at",
        "give tokens with context.valid False the id num_experts and a gate of 0",
    ),
    "unused choices weigh nothing": (
        "gates are not set to 0 where the id is num_experts",
        "write jnp.where(used, gates, 0.0)",
    ),
    "state keeps its shapes": (
        "update_state adds, drops or reshapes an entry of the state",
        "return the same names, shapes and dtypes that init_state gives",
    ),
    "the state stays finite": (
        "update_state divides by a load that can be zero",
        "divide by jnp.maximum(load, 1)",
    ),
    "gradients are finite": (
        "a square root, division or logarithm at zero, also where its value is masked afterwards",
        "make its argument safe first: jnp.where on the input as well as on the result",
    ),
    "its parameters learn": (
        "a parameter of Scheme.params reaches neither gates nor losses, or through stop_gradient only",
        "use it in logits, gates or a loss, or leave it out",
    ),
    "permuted tokens, permuted outputs": (
        "the place of a token decides, or random numbers that are no context.rng",
        "leave places out, or declare Scheme(equivariant=False)",
    ),
    "padding changes nothing": (
        "a sum or mean over all T tokens counts padding too",
        "multiply by context.valid and divide by the number of valid tokens, as losses.mean does",
    ),
    "nothing but padding is zero": (
        "a division by the number of valid tokens, which is zero in a row of padding",
        "divide by jnp.maximum(count, 1)",
    ),
    "causal as declared": (
        "a sum, mean or sort over the tokens of the group lets later tokens in",
        "use what a token itself has, or declare Scheme(causal=False); it then cannot decode as it trained",
    ),
    "statistics of parts add up": (
        "Scheme.measure gives means, or it or a loss counts padding",
        "give sums over valid tokens, and their number as another entry",
    ),
    "sound on odd inputs": (
        "ties, large logits, a missing modality or a single token are not thought of",
        "make divisions and logarithms safe for zero counts",
    ),
    "choices count": (
        "gates are zero where an expert is chosen",
        "give it a gate above 0, or set its id to num_experts, which costs no work",
    ),
    "one input, one decision": (
        "a callback to the host, or random numbers that are no context.rng",
        "draw from context.rng alone, and declare Scheme(rng=True)",
    ),
    "two fresh traces agree": (
        "numpy's random numbers, a global counter or the time, read while the function is traced",
        "keep what changes in the state, and draw from context.rng with Scheme(rng=True)",
    ),
    "route leaves its state alone": (
        "route assigns to an entry of the state, which is lost, or counted twice where layers are recomputed",
        "return it from update_state, by Scheme.measure if it needs the tokens",
    ),
    "the input alone decides": (
        "the number of tokens with their padding, a global or numpy's random numbers decide",
        "count valid tokens, and keep what changes in the state",
    ),
    "rows are routed on their own": (
        "a sum over the axis 'groups', or its index, reaches the choice",
        "such sums are for losses alone",
    ),
    "the router learns": (
        "gates are constants: stop_gradient, a one-hot, or one gate divided by itself (K = 1 normalised)",
        "multiply by scores that depend on logits or parameters; with top_k=1 set gates.normalize=False",
    ),
    "higher logits choose": (
        "the order of gates is not that of experts, or logits are negated",
        "weigh by gates_of(scores, experts), or declare Scheme(by_expert=False) if columns are no experts",
    ),
    "losses teach": (
        "a loss counts choices only, or has the wrong sign",
        "multiply the counts by mean scores, as losses.balance_loss does",
    ),
    "scores are float32": (
        "logits or scores are cast to bfloat16 or float16, which makes ties",
        "compute scores in float32, which logits come in",
    ),
    "every expert is reached": (
        "ids are fixed, or a bias of the state grows past all scores",
        "choose by scores, and bound the step of update_state",
    ),
    "noise as declared": (
        "evaluation has no context.rng (it is None), or noise is drawn and not declared",
        "draw only if context.rng is not None, and declare Scheme(rng=True)",
    ),
    "excluded experts are passed over": (
        "jax.lax.top_k over scores with a bias takes an expert that is excluded",
        "choose by best(scores, config.top_k, context)",
    ),
    "kernels agree": (
        "the assignment has values that kernels read differently, such as not-a-number or repeated ids",
        "correct the other properties first",
    ),
    "kernels agree with few slots": (
        "as where kernels agree; here choices without a slot are dropped",
        "correct the other properties first",
    ),
    "one device = many": (
        "the number or the place of devices decides, or sums over 'groups' of other than losses",
        "use nothing but the arguments of route",
    ),
    "given routes are taken": (
        "declared replays=True, but experts are not chosen by best, or gates not of the scores of this pass",
        "choose by best and weigh by gates_of, or leave Scheme(replays=False)",
    ),
}
