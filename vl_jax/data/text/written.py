"""A sample as a text alone: what was written, without marks, images and answers, as towers of text read it.

    turns   "<image>\\nWhat is it?" -> "A cat."    --text-->   What is it?\\nA small cat. EOS
            (no question)          -> "A small cat."

A question is kept and its answer is not, for a tower that saw the answer would have nothing to find out. Of
a turn without a question, a caption or a text, the answer is the text.
"""

from __future__ import annotations

import numpy as np

from vl_jax.data.sample import TEXT, Sample
from vl_jax.data.text.chat import Dialogue, VisualRun
from vl_jax.data.text.tokenizer import Tokenizer


def written(sample: Sample) -> str:
    """What was written, one line a turn; empty if nothing was."""
    turns = sample.without_images().turns
    texts = [turn.answer.strip() if turn.kind == TEXT else turn.question for turn in turns]
    return "\n".join(filter(None, texts))


def alone(text: str, tokenizer: Tokenizer, *, max_tokens: int) -> list[int]:
    """The tokens of a text that is read by itself; one that is longer is cut before its EOS."""
    before, after = tokenizer.around
    room = max(max_tokens - len(before) - len(after), 0)
    return [*before, *tokenizer.encode(text)[:room], *after]


def encode_written(
    sample: Sample, tokenizer: Tokenizer, *, max_tokens: int, wordless: bool = False
) -> Dialogue:
    """Encodes what was written, and what the tokenizer puts around it, EOS at least.

    Nothing is a target, and no special token comes from the text.

    The images stand beside the text, seen from its first token on: they take no place of the sequence.

    Args:
      max_tokens: a longer text is cut at its end, before the EOS (as CLIP does).
      wordless: a sample of which nothing is written has no token at all.
    """
    text = written(sample)
    ids = [] if wordless and not text else alone(text, tokenizer, max_tokens=max_tokens)
    nothing = np.zeros(len(ids), np.int32)
    return Dialogue(
        tokens=np.array(ids, np.int32),
        targets=nothing,
        loss_weights=nothing.astype(np.float32),
        positions=np.arange(len(ids), dtype=np.int32),
        branch_ids=nothing,
        visual_runs=tuple(VisualRun(image, start=0, length=0) for image in range(len(sample.images))),
        answer_runs=(),
        num_turns=len(sample.turns),
    )
