"""The published exams by name, and those in files of one's own."""

from __future__ import annotations

from vl_jax import parts
from vl_jax.evaluate.exams.captions import CAPTIONS
from vl_jax.evaluate.exams.chartqa import CHARTQA
from vl_jax.evaluate.exams.docvqa import DOCVQA
from vl_jax.evaluate.exams.exam import Exam
from vl_jax.evaluate.exams.mmbench import MMBENCH
from vl_jax.evaluate.exams.ocrbench import OCRBENCH
from vl_jax.evaluate.exams.pope import POPE
from vl_jax.evaluate.exams.refcoco import REFCOCO
from vl_jax.evaluate.exams.textvqa import TEXTVQA
from vl_jax.evaluate.exams.vqav2 import VQAV2

EXAMS = {
    exam.layout: exam
    for exam in (DOCVQA, CHARTQA, TEXTVQA, VQAV2, REFCOCO, OCRBENCH, MMBENCH, POPE, CAPTIONS)
}


def find_exam(name: str) -> Exam:
    """The exam of a name, or of ``path/to/file.py:NAME``.

    Raises:
      ValueError: there is none, with the nearest name; or it is no ``Exam``.
    """
    if name in EXAMS:
        return EXAMS[name]
    found = parts.find(name, EXAMS, kind="task", expected="an Exam")
    if not isinstance(found, Exam):
        raise ValueError(f"task={name!r}: expected an Exam, found {type(found).__name__}")
    return found
