"""DeepSeek-VL2 tiny, 3.4 billion parameters; see ``deepseek_vl2``.

python -m vl_jax fit --config=experiments/deepseek_vl2_tiny.py --topology=v5e:4x4
"""

from vl_jax import config


def get_config():
    """The experiment; every field can be set on the command line."""
    return config.view(config.load("deepseek_vl2:tiny"))
