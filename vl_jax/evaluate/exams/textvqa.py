"""TextVQA: text in photographs of some 1000 pixels, small text among them.

Layout: ``data/sources/exams/textvqa.py``. Prompt: as lmms-eval asks, without texts of a character reader,
which would be worth points. Metric: VQA accuracy as the exam's server normalises answers. Source: Singh et
al., 2019.
"""

from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.metrics.text.vqa import VQAAccuracy

TEXTVQA = Exam(
    layout="textvqa",
    prompt="{question}\nAnswer the question using a single word or phrase.",
    headline="vqa_accuracy",
    metrics=(VQAAccuracy(variant="evalai"),),
    max_new_tokens=16,
)
