"""Conversations to token ids and label masks, built together (the text format of DeepSeek-VL2).

    BOS system <|User|>: QUESTION\\n\\n<|Assistant|>:ANSWER EOS <|User|>: ...

Text is split at ``<image>`` and every piece is encoded by itself. In the *dialogue* form each turn sees
the ones before it. In the *independent* form the turns are separate conversations that share their
beginning, the *trunk*, up to the last image:

    positions   0 .. p-1     p ..                          a question never sees another one, and its
    trunk       BOS ... image                              tokens and positions are those of a
    branch 1                 QUESTION 1 ... ANSWER EOS     conversation with this question alone
    branch 2                 QUESTION 2 ... ANSWER EOS
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, BadSample, Sample, standalone_questions
from vl_jax.data.text.tokenizer import GROUNDING, SPECIAL, Tokenizer, recalled

Turns = Literal["dialogue", "independent"]
Targets = Literal["all", "answers", "text"]

# What a raw text may hold as single tokens: all but the image mark, which stands for a run of its own.
VERBATIM = tuple(s for s in SPECIAL if s != IMAGE_PLACEHOLDER)


@dataclass(frozen=True)
class VisualRun:
    """A run of image placeholders: the image's index, and the run's start and length in the sequence."""

    image: int
    start: int
    length: int


@dataclass(frozen=True)
class Dialogue:
    """One encoded conversation; the arrays have one entry for each sequence position."""

    tokens: np.ndarray  # i32[t]
    targets: np.ndarray  # i32[t] the id to predict from here, 0 where there is none
    loss_weights: np.ndarray  # f32[t] the weight of the turn where there is a target, 0 elsewhere
    positions: np.ndarray  # i32[t]
    branch_ids: np.ndarray  # i32[t]
    visual_runs: tuple[VisualRun, ...]
    answer_runs: tuple[range, ...]  # where the answers stand, their EOS included
    num_turns: int


_PER_POSITION = ("tokens", "targets", "loss_weights", "positions", "branch_ids")

# A part of a conversation: ids, with None standing for one image's run; and whether it is an answer.
_Part = tuple[list[Any], bool]

# What a run of tokens is.
_WRITTEN, _ANSWER, _IMAGE = range(3)


def encode_dialogue(
    sample: Sample,
    tokenizer: Tokenizer,
    *,
    image_lengths: Sequence[int],
    turns: Turns = "dialogue",
    targets: Targets = "answers",
    max_tokens: int | None = None,
) -> Dialogue:
    """Encodes a conversation for training.

    Args:
      image_lengths: sequence positions each image takes (all of them hold the ``<image>`` id).
      turns: whether later turns see earlier ones.
      targets: ``answers`` supervises each answer and its EOS; ``all`` every text token that follows a
        text token of the same branch; ``text`` every text token, also the first one after an image (as the
        published processor does). Images and the first token of a branch are never targets.
      max_tokens: turns from the first one that does not fit are left out.

    Raises:
      BadSample: placeholders and images do not match, a turn of the independent form brings its own
        image, or not even the first turn fits.
    """
    _check(sample, image_lengths)
    draft = _Draft(tokenizer.image, image_lengths)
    if turns == "dialogue":
        draft.extend([([tokenizer.bos, *_encode(tokenizer, sample.system.strip())], False)], 0)
        questions = [t.question for t in sample.turns]
        branches = [0] * len(questions)
    else:
        trunk, questions = _split_trunk(sample, tokenizer)
        draft.extend([(trunk, False)], 0)
        branches = list(range(1, len(questions) + 1))
    opened = turns == "independent" and bool(sample.images)
    prompt_of, num_turns = _tail if opened else _user, 0
    for turn, question, branch in zip(sample.turns, questions, branches, strict=True):
        prompt = [] if turn.kind == TEXT and not opened else prompt_of(tokenizer, question)
        answer = _answer(tokenizer, turn.answer)
        if max_tokens is not None and len(draft.tokens) + draft.room(prompt) + len(answer) > max_tokens:
            break
        draft.extend([(prompt, False), (answer, True)], branch, weight=turn.weight)
        num_turns += 1
    if not num_turns:
        raise BadSample("too_long", f"sample {sample.id}: its first turn does not fit {max_tokens} tokens")
    return draft.finish(targets, num_turns)


def keep_turns(dialogue: Dialogue, turns: Turns, chosen: Sequence[int]) -> Dialogue:
    """The dialogue with some of its turns only.

    Args:
      chosen: of the independent form any turns in any order; of the dialogue form the first few.
    """
    branches = [0, *(1 + turn for turn in chosen)]
    if turns == "dialogue":
        places = np.arange(dialogue.answer_runs[len(chosen) - 1].stop)
    else:
        places = np.concatenate([np.flatnonzero(dialogue.branch_ids == branch) for branch in branches])
    new = np.full(len(dialogue.tokens), -1)
    new[places] = np.arange(len(places))
    kept = {name: getattr(dialogue, name)[places] for name in _PER_POSITION}
    kept["targets"][-1] = kept["loss_weights"][-1] = 0  # What was to be predicted here is not there any more.
    answers = [dialogue.answer_runs[turn] for turn in chosen]
    return Dialogue(
        **kept,
        visual_runs=tuple(r for r in dialogue.visual_runs if new[r.start] >= 0),
        answer_runs=tuple(range(int(new[run.start]), int(new[run.start]) + len(run)) for run in answers),
        num_turns=len(chosen),
    )


def encode_prompt(sample: Sample, tokenizer: Tokenizer, *, image_lengths: Sequence[int]) -> Dialogue:
    """Encodes a conversation up to where the answer of its last turn would begin; nothing is a target.

    Raises:
      BadSample: placeholders and images do not match.
    """
    _check(sample, image_lengths)
    parts: list[_Part] = [([tokenizer.bos, *_encode(tokenizer, sample.system.strip())], False)]
    for index, turn in enumerate(sample.turns):
        parts.append((_user(tokenizer, turn.question), False))
        if index < len(sample.turns) - 1:
            parts.append((_answer(tokenizer, turn.answer), True))
    draft = _Draft(tokenizer.image, image_lengths)
    draft.extend(parts, 0)
    return draft.finish(None, len(sample.turns))


def encode_text(
    sample: Sample,
    tokenizer: Tokenizer,
    *,
    image_lengths: Sequence[int],
    wrapped: bool,
    complete: bool,
    allowed: Sequence[str] = VERBATIM,
) -> Dialogue:
    """Encodes one text the way pre-training reads it: BOS, the text, EOS, with every text token a target.

    Args:
      sample: its only turn's question is the text. ``Sample.system`` is read in the wrapped form only.
      wrapped: the text becomes a user's turn, up to where the answer begins (behind the system text and an
        empty line); otherwise it is taken verbatim, and role marks written in it become their tokens.
      allowed: which special strings become their tokens in a text that is taken verbatim.
      complete: False leaves the EOS out, so that the text can be continued; nothing is a target then.

    Raises:
      BadSample: placeholders and images do not match.
    """
    _check(sample, image_lengths)
    (turn,) = sample.turns
    if wrapped:
        system = f"{sample.system}\n\n" if sample.system else ""
        text = [*_encode(tokenizer, system), *_user(tokenizer, turn.question)]
    else:
        text = _pieces(tokenizer, turn.question, allowed)
    parts: list[_Part] = [([tokenizer.bos], False), ([*text, *([tokenizer.eos] * complete)], True)]
    draft = _Draft(tokenizer.image, image_lengths)
    draft.extend(parts, 0)
    return draft.finish("text" if complete else None, 1)


def _check(sample: Sample, image_lengths: Sequence[int]) -> None:
    placeholders = sum(t.question.count(IMAGE_PLACEHOLDER) for t in sample.turns)
    if placeholders != len(image_lengths):
        message = f"sample {sample.id}: {placeholders} placeholders for {len(image_lengths)} images"
        raise BadSample("placeholder_mismatch", message)
    if not sample.turns:
        raise BadSample("bad_conversation", f"sample {sample.id}: no turns")


def _split_trunk(sample: Sample, tokenizer: Tokenizer) -> tuple[list[int | None], list[str]]:
    """The shared beginning, and each turn's text after it."""
    trunk: list[int | None] = [tokenizer.bos, *_encode(tokenizer, sample.system.strip())]
    questions = standalone_questions(sample)
    if not sample.images:
        return trunk, questions
    head = questions[0].lstrip().rpartition(IMAGE_PLACEHOLDER)[0] + IMAGE_PLACEHOLDER
    trunk += [tokenizer.user, *_pieces(tokenizer, ": " + head)]
    return trunk, [q.lstrip()[len(head) :] for q in questions]


@recalled
def _user(tokenizer: Tokenizer, question: str) -> list[int | None]:
    """A whole user turn and the mark that the answer follows."""
    text = f": {question.strip()}\n\n"
    return [tokenizer.user, *_pieces(tokenizer, text), tokenizer.assistant, *_encode(tokenizer, ":")]


@recalled
def _tail(tokenizer: Tokenizer, text: str) -> list[int | None]:
    """What follows the last image of a user turn."""
    text = f"{text.rstrip()}\n\n"
    return [*_encode(tokenizer, text), tokenizer.assistant, *_encode(tokenizer, ":")]


@recalled
def _answer(tokenizer: Tokenizer, text: str) -> list[int]:
    """An answer and its end."""
    return [*_encode(tokenizer, text.strip()), tokenizer.eos]


def _pieces(tokenizer: Tokenizer, text: str, allowed: Sequence[str] = GROUNDING) -> list[int | None]:
    """Encodes text around its image placeholders; each placeholder becomes None."""
    first, *rest = text.split(IMAGE_PLACEHOLDER)
    ids: list[int | None] = list(tokenizer.encode(first, allowed=allowed))
    for piece in rest:
        ids += [None, *tokenizer.encode(piece, allowed=allowed)]
    return ids


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    # Grounding marks are part of what users write; role, sequence and image marks never come from text.
    return tokenizer.encode(text, allowed=GROUNDING)


def _runs(ids: list[Any]) -> Iterator[list[int] | None]:
    """The stretches of tokens between images, and None for each image."""
    start = 0
    for _ in range(ids.count(None)):
        stop = ids.index(None, start)
        if stop > start:
            yield ids[start:stop]
        yield None
        start = stop + 1
    if start < len(ids):
        yield ids[start:] if start else ids


class _Draft:
    """A dialogue that is being written: runs of tokens in lists, and everything else from them at the end."""

    def __init__(self, image_id: int, image_lengths: Sequence[int]):
        self.tokens: list[int] = []
        self._image_id, self._image_lengths = image_id, image_lengths
        self._runs: list[tuple[int, int, int, int]] = []  # branch, sequence index less position, kind, length
        self._weights: list[float] = []  # of each run in the loss
        self._branch = self._shift = self._trunk = 0
        self._visual_runs: list[VisualRun] = []
        self._answer_runs: list[range] = []

    def room(self, ids: list[Any]) -> int:
        """How many positions the part would take if it came next."""
        images, seen = ids.count(None), len(self._visual_runs)
        return len(ids) - images + sum(self._image_lengths[seen : seen + images])

    def extend(self, parts: Sequence[_Part], branch: int, *, weight: float = 1.0) -> None:
        """Adds parts of one branch, opening image runs; positions go on from the branch or the trunk.

        Args:
          weight: of the answers among them in the loss.
        """
        if branch != self._branch:
            self._trunk = len(self.tokens) if self._branch == 0 else self._trunk
            self._branch, self._shift = branch, len(self.tokens) - self._trunk
        for ids, is_answer in parts:
            start, kind = len(self.tokens), _ANSWER if is_answer else _WRITTEN
            for run in _runs(ids) if None in ids else (ids,):
                if run is None:
                    length = self._image_lengths[len(self._visual_runs)]
                    self._visual_runs.append(VisualRun(len(self._visual_runs), len(self.tokens), length))
                    self._append([self._image_id] * length, _IMAGE, 1.0)
                else:
                    self._append(run, kind, weight if is_answer else 1.0)
            if is_answer:
                self._answer_runs.append(range(start, len(self.tokens)))

    def _append(self, run: list[int], kind: int, weight: float) -> None:
        self.tokens += run
        self._weights.append(weight)
        self._runs.append((self._branch, self._shift, kind, len(run)))

    def finish(self, targets: Targets | None, num_turns: int) -> Dialogue:
        """The dialogue; without ``targets`` nothing is predicted."""
        tokens, runs = np.array(self.tokens, np.int32), np.array(self._runs, np.int32).T
        branch_ids, shifts, kinds = np.repeat(runs[:3], runs[3], axis=1)
        # A token is predicted from the one before it, where that is of the same branch.
        weights = np.repeat(np.array(self._weights, np.float32), runs[3])
        here = np.zeros(len(tokens), bool)
        here[:-1] = (_predicted(kinds, targets) & (weights > 0))[1:] & (branch_ids[1:] == branch_ids[:-1])
        counted = here.astype(np.float32)
        counted[:-1] *= weights[1:]
        following = np.zeros(len(tokens), np.int32)
        following[:-1] = tokens[1:] * here[:-1]
        return Dialogue(
            tokens=tokens,
            targets=following,
            loss_weights=counted,
            positions=np.arange(len(tokens), dtype=np.int32) - shifts,
            branch_ids=branch_ids,
            visual_runs=tuple(self._visual_runs),
            answer_runs=tuple(self._answer_runs),
            num_turns=num_turns,
        )


def _predicted(kinds: np.ndarray, targets: Targets | None) -> np.ndarray:
    """Which tokens of a dialogue are predicted, seen by themselves: ``bool[t]``."""
    if targets is None:
        return np.zeros(len(kinds), bool)
    if targets == "answers":
        return kinds == _ANSWER
    text = kinds != _IMAGE
    if targets == "all":
        text[1:] &= text[:-1]
    return text
