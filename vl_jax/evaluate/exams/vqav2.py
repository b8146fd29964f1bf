"""VQAv2: photographs of COCO, at most 640 pixels a side, about which people agree more or less.

Layout: ``data/sources/exams/vqav2.py``. Prompt: as lmms-eval asks. Metric: VQA accuracy of the official
script, by kind of answer. Source: Goyal et al., 2017.
"""

from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.metrics.text.vqa import VQAAccuracy

VQAV2 = Exam(
    layout="vqav2",
    prompt="{question}\nAnswer the question using a single word or phrase.",
    headline="vqa_accuracy",
    metrics=(VQAAccuracy(),),
    max_new_tokens=16,
)
