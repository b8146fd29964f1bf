"""DeepSeek-VL2 small, 16.1 billion parameters; see ``deepseek_vl2``.

python -m vl_jax fit --config=experiments/deepseek_vl2_small.py --topology=v5p:4x4x4
"""

from vl_jax import config


def get_config():
    """The experiment; every field can be set on the command line."""
    return config.view(config.load("deepseek_vl2:small"))
