"""DocVQA: text on scanned pages, which are large; a page in one tile can hardly be read.

Layout: ``data/sources/exams/docvqa.py``. Prompt: as lmms-eval asks. Metric: ANLS, strict as in the paper;
kits have a variant each. Source: Mathew et al., 2021.
"""

from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.metrics.text.anls import ANLS

DOCVQA = Exam(
    layout="docvqa",
    prompt="{question}\nAnswer the question using a single word or phrase.",
    headline="anls",
    metrics=(ANLS(),),
)
