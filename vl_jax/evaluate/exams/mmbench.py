"""MMBench: options to choose from, under every rotation of them; pictures of some 500 pixels.

Layout: ``data/sources/exams/mmbench.py``. Prompt: hint, question and options as lmms-eval asks. Metric: the
circular score, and the plain one beside it; no language model reads answers. Source: Liu et al., 2023.
"""

from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.exams.metrics import Circular

MMBENCH = Exam(
    layout="mmbench",
    prompt="{hint}{question}\n{options}\nAnswer with the option's letter from the given choices directly.",
    headline="circular",
    metrics=(Circular(),),
    max_new_tokens=16,
)
