"""Mixture of experts: schemes, balance, dispatch, expert parallelism, and the layer."""
