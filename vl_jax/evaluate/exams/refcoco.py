"""RefCOCO, RefCOCO+ and RefCOCOg: which object a phrase means, in photographs of at most 640 pixels a side.

Layout: ``data/sources/exams/refcoco.py``. Prompt: the phrase in the marks of DeepSeek-VL2, on whose grid of
0..999 boxes are expected; another family needs ``prompt`` and ``metrics.box_accuracy.grid``. Metric: overlap
of one half or more; an answer without a box is wrong, and malformed. Source: Yu et al., 2016.
"""

from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.exams.metrics import PhraseBoxes

REFCOCO = Exam(
    layout="refcoco",
    prompt="<|ref|>{question}<|/ref|>",
    headline="box_accuracy",
    metrics=(PhraseBoxes(),),
    max_new_tokens=64,
)
