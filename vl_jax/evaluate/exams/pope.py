"""POPE: whether an object is in a photograph of COCO, at most 640 pixels a side.

Layout: ``data/sources/exams/pope.py``. Prompt: as lmms-eval asks. Metric: F1, with accuracy, precision,
recall, rate of yes and unreadable answers; the three sets apart. Source: Li et al., 2023.
"""

from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.metrics.text.yes_no import YesNo

POPE = Exam(
    layout="pope",
    prompt="{question}\nAnswer the question using a single word or phrase.",
    headline="pope_f1",
    metrics=(YesNo(),),
    max_new_tokens=16,
)
