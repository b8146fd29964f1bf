"""The built-in routing schemes; ``vl_jax.moe.routing.SCHEMES`` says which of them is where."""
