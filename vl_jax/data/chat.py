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
from dataclasses import dataclass, field
from typing import Any, Literal

from vl_jax.data.sample import IMAGE_PLACEHOLDER, TEXT, BadSample, Sample, standalone_questions
from vl_jax.data.tokenizer import GROUNDING, SPECIAL, Tokenizer, recalled

Turns = Literal["dialogue", "independent"]
Targets = Literal["all", "answers", "text"]

# What a raw text may hold as single tokens: all but the image mark, which stands for a run of its own.
_VERBATIM = tuple(s for s in SPECIAL if s != IMAGE_PLACEHOLDER)


@dataclass(frozen=True)
class VisualRun:
    """A run of image placeholders: the image's index, and the run's start and length in the sequence."""

    image: int
    start: int
    length: int


@dataclass
class Dialogue:
    """One encoded conversation; the lists have one entry for each sequence position."""

    tokens: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)  # the id to predict from here, 0 where there is none
    loss_weights: list[float] = field(default_factory=list)  # 1 where there is a target
    positions: list[int] = field(default_factory=list)
    branch_ids: list[int] = field(default_factory=list)
    visual_runs: list[VisualRun] = field(default_factory=list)
    answer_runs: list[range] = field(default_factory=list)  # where the answers stand, their EOS included
    num_turns: int = 0

    def _append(self, ids: list[int], *, branch: int, position: int, first: bool, rest: bool) -> None:
        """Adds a run of tokens of one branch; whether the first is a target, and whether the rest are."""
        count = len(ids)
        if first and self.tokens and self.branch_ids[-1] == branch:
            self.targets[-1], self.loss_weights[-1] = ids[0], 1.0
        self.tokens += ids
        self.targets += [*ids[1:], 0] if rest else [0] * count
        self.loss_weights += [1.0] * (count - 1) + [0.0] if rest else [0.0] * count
        self.positions += range(position, position + count)
        self.branch_ids += [branch] * count


_PER_POSITION = ("tokens", "targets", "loss_weights", "positions", "branch_ids")

# A part of a conversation: ids, with None standing for one image's run; and whether it is an answer.
_Part = tuple[list[Any], bool]


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
    result = Dialogue()
    if turns == "dialogue":
        start = [tokenizer.bos, *_encode(tokenizer, sample.system.strip())]
        _extend(result, [(start, False)], 0, image_lengths, tokenizer.image, targets)
        questions = [t.question for t in sample.turns]
        branches = [0] * len(questions)
    else:
        trunk, questions = _split_trunk(sample, tokenizer)
        _extend(result, [(trunk, False)], 0, image_lengths, tokenizer.image, targets)
        branches = list(range(1, len(questions) + 1))
    for turn, question, branch in zip(sample.turns, questions, branches, strict=True):
        opened = turns == "independent" and bool(sample.images)
        prompt = _tail(tokenizer, question) if opened else _user(tokenizer, question)
        if turn.kind == TEXT and not opened:
            prompt = []
        answer = _answer(tokenizer, turn.answer)
        images, seen = prompt.count(None), len(result.visual_runs)
        length = len(prompt) + len(answer) - images + sum(image_lengths[seen : seen + images])
        if max_tokens is not None and len(result.tokens) + length > max_tokens:
            break
        parts: list[_Part] = [(prompt, False), (answer, True)]
        _extend(result, parts, branch, image_lengths, tokenizer.image, targets)
        result.num_turns += 1
    if not result.num_turns:
        raise BadSample("too_long", f"sample {sample.id}: its first turn does not fit {max_tokens} tokens")
    return result


def keep_turns(dialogue: Dialogue, turns: Turns, chosen: Sequence[int]) -> Dialogue:
    """The dialogue with some of its turns only.

    Args:
      chosen: of the independent form any turns in any order; of the dialogue form the first few.
    """
    if turns == "dialogue":
        places = list(range(dialogue.answer_runs[len(chosen) - 1].stop))
    else:
        branches: dict[int, list[int]] = {0: []}
        for place, branch in enumerate(dialogue.branch_ids):
            branches.setdefault(branch, []).append(place)
        places = [p for branch in (0, *(1 + turn for turn in chosen)) for p in branches[branch]]
    new = {place: index for index, place in enumerate(places)}
    kept = {name: [getattr(dialogue, name)[p] for p in places] for name in _PER_POSITION}
    if kept["loss_weights"][-1]:  # What was to be predicted here is not there any more.
        kept["loss_weights"][-1], kept["targets"][-1] = 0.0, 0
    runs = [r for r in dialogue.visual_runs if r.start in new]
    answers = [dialogue.answer_runs[turn] for turn in chosen]
    return Dialogue(
        **kept,
        visual_runs=runs,
        answer_runs=[range(new[run.start], new[run.start] + len(run)) for run in answers],
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
    result = Dialogue(num_turns=len(sample.turns))
    _extend(result, parts, 0, image_lengths, tokenizer.image, None)
    return result


def encode_text(
    sample: Sample, tokenizer: Tokenizer, *, image_lengths: Sequence[int], wrapped: bool, complete: bool
) -> Dialogue:
    """Encodes one text the way pre-training reads it: BOS, the text, EOS, with every text token a target.

    Args:
      sample: its only turn's question is the text. ``Sample.system`` is read in the wrapped form only.
      wrapped: the text becomes a user's turn, up to where the answer begins (behind the system text and an
        empty line); otherwise it is taken verbatim, and role marks written in it become their tokens.
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
        text = _pieces(tokenizer, turn.question, _VERBATIM)
    parts: list[_Part] = [([tokenizer.bos], False), ([*text, *([tokenizer.eos] * complete)], True)]
    result = Dialogue(num_turns=1)
    _extend(result, parts, 0, image_lengths, tokenizer.image, "text" if complete else None)
    return result


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


def _extend(
    result: Dialogue,
    parts: Sequence[_Part],
    branch: int,
    image_lengths: Sequence[int],
    image_id: int,
    targets: Targets | None,
) -> None:
    """Appends parts of one branch, opening image runs; positions go on from the branch or the trunk."""
    every, adjacent, answers = targets == "text", targets == "all", targets is not None
    if result.branch_ids and result.branch_ids[-1] == branch:
        position = result.positions[-1] + 1
    else:
        position = result.branch_ids.count(0)
    after_text = bool(result.tokens)  # The first piece of a branch has its supervision cut by ``_append``.
    for ids, is_answer in parts:
        start, always = len(result.tokens), (is_answer and answers) or every
        for run in _runs(ids):
            first, rest = always or (adjacent and after_text), always or adjacent
            after_text = run is not None
            if run is None:
                length = image_lengths[len(result.visual_runs)]
                result.visual_runs.append(VisualRun(len(result.visual_runs), len(result.tokens), length))
                run, first, rest = [image_id] * length, False, False
            result._append(run, branch=branch, position=position, first=first, rest=rest)
            position += len(run)
        if is_answer:
            result.answer_runs.append(range(start, len(result.tokens)))
