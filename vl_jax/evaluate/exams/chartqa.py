"""ChartQA: charts of some 800 pixels; numbers may be 5 % off.

Layout: ``data/sources/exams/chartqa.py``. Prompt: as lmms-eval asks. Metric: relaxed accuracy, the human and
the augmented half apart. Source: Masry et al., 2022.
"""

from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.metrics.text.relaxed import RelaxedAccuracy

CHARTQA = Exam(
    layout="chartqa",
    prompt="{question}\nAnswer the question with a single word.",
    headline="relaxed_accuracy",
    metrics=(RelaxedAccuracy(),),
    max_new_tokens=16,
)
