"""OCRBench: from cut-out words of some 100 pixels to whole pages.

Layout: ``data/sources/exams/ocrbench.py``. Prompt: the question as it is. Metric: answers that hold a
reference, as share and as points, by category; their mean length beside it. Source: Liu et al., 2023.
"""

from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.exams.metrics import OCRBench

OCRBENCH = Exam(
    layout="ocrbench",
    prompt="{question}",
    headline="ocrbench",
    metrics=(OCRBench(),),
    max_new_tokens=128,
)
