"""Captions of COCO, and whatever has their form: photographs of at most 640 pixels a side.

Layout: ``data/sources/exams/captions.py``. Prompt: as lmms-eval asks. Metric: CIDEr-D and ROUGE-L; weights of
CIDEr-D come from the captions that are scored, so parts of a set cannot be compared. Source: Chen et al.,
2015.
"""

from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.metrics.text.cider import CIDErD
from vl_jax.evaluate.metrics.text.rouge import RougeL

CAPTIONS = Exam(
    layout="captions",
    prompt="{question}Provide a one-sentence caption for the provided image.",
    headline="cider_d",
    metrics=(CIDErD(), RougeL()),
    max_new_tokens=64,
)
