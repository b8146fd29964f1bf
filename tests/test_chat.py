"""Token ids and label masks of conversations, in both forms."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import processor_folder
from PIL import Image as PilImage

from vl_jax.data.images.tiling import TilingConfig, best_grid, num_visual_tokens
from vl_jax.data.sample import BadSample, FileImage, Sample, Turn, standalone_questions
from vl_jax.data.text.bounded import bounded
from vl_jax.data.text.chat import encode_dialogue, encode_prompt, encode_text
from vl_jax.data.text.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer()


def picture():
    return PilImage.new("RGB", (2, 2))


def conversation(*pairs: tuple[str, str], system: str = "") -> Sample:
    images = tuple(picture for _ in range(sum(q.count("<image>") for q, _ in pairs)))
    return Sample("s", tuple(Turn(q, a) for q, a in pairs), images, system)


def encode(sample, **options):
    return encode_dialogue(sample, TOKENIZER, image_lengths=[3] * len(sample.images), **options)


SAMPLE = conversation(
    ("<image>\nWhat colour?", "red"), ("Which shape?", "圆形"), ("How many?", "2"), system="Look."
)
# Pieces of text that stress splitting, stripping and joining.
texts = st.lists(
    st.sampled_from(["a", " ", "\n", "什么", "<|ref|>", "<|User|>", "?", ":", "the owl", "🦉"]), max_size=6
).map("".join)


def test_the_text_format_by_hand():
    sample = conversation((" <image>\nWhat? ", " red "), ("Sure?", "yes"), system=" Look. ")
    bos, eos, user, assistant = TOKENIZER.bos, TOKENIZER.eos, TOKENIZER.user, TOKENIZER.assistant
    e = TOKENIZER.encode
    first = [user, *e(": "), *[TOKENIZER.image] * 3, *e("\nWhat?\n\n"), assistant, *e(":"), *e("red"), eos]
    second = [user, *e(": Sure?\n\n"), assistant, *e(":"), *e("yes"), eos]
    assert encode(sample).tokens.tolist() == [bos, *e("Look."), *first, *second]


def targets_of(dialogue) -> str:
    return TOKENIZER.decode(dialogue.targets[dialogue.loss_weights > 0].tolist())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(texts, texts), min_size=1, max_size=3), st.sampled_from(["dialogue", "independent"])
)
def test_supervised_tokens_are_exactly_the_answers(pairs, turns):
    (first, answer), *rest = pairs
    sample = conversation((f"<image>{first}", answer), *rest)
    expected = "".join(a.strip() + "<｜end▁of▁sentence｜>" for _, a in pairs)
    assert targets_of(encode(sample, turns=turns)) == expected


def test_a_target_is_the_next_token_of_its_branch():
    for turns in ("dialogue", "independent"):
        for targets in ("answers", "all"):
            d = encode(SAMPLE, turns=turns, targets=targets)
            for i, weight in enumerate(d.loss_weights):
                if weight:
                    assert d.targets[i] == d.tokens[i + 1] and d.branch_ids[i] == d.branch_ids[i + 1]
            assert d.loss_weights[-1] == 0


@settings(max_examples=60, deadline=None)
@given(texts, texts, texts, st.sampled_from(["answers", "all"]), st.booleans())
def test_a_single_turn_reads_the_same_in_both_forms(before, after, answer, targets, has_image):
    question = f"{before}<image>{after}" if has_image else before + after
    sample = conversation((question, answer), system="Look.")
    a, b = (encode(sample, turns=t, targets=targets) for t in ("dialogue", "independent"))
    assert (a.tokens.tolist(), a.visual_runs) == (b.tokens.tolist(), b.visual_runs)
    assert a.positions.tolist() == b.positions.tolist()
    # Only the step from the trunk, which many branches share, to a branch is never a target.
    differing = [
        i for i, pair in enumerate(zip(a.loss_weights, b.loss_weights, strict=True)) if len(set(pair)) == 2
    ]
    assert all(b.branch_ids[i] == 0 and b.branch_ids[i + 1] == 1 for i in differing)
    assert differing == [] or (targets == "all" and not has_image)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=2, max_size=4), st.booleans())
def test_a_branch_is_the_conversation_with_its_question_alone(pairs, has_image):
    (first, answer), *rest = pairs
    sample = conversation(("<image>" * has_image + first, answer), *rest, system="Look.")
    together = encode(sample, turns="independent")
    ids = together.branch_ids
    for index, question in enumerate(standalone_questions(sample)):
        turn = dataclasses.replace(sample.turns[index], question=question)
        alone = encode(dataclasses.replace(sample, turns=(turn,)))
        mine = (ids == 0) | (ids == index + 1)
        for name in ("tokens", "positions", "targets", "loss_weights"):
            assert getattr(together, name)[mine].tolist() == getattr(alone, name).tolist()


def test_all_targets_are_the_text_that_follows_text():
    d = encode(conversation(("<image>\nWhat?", "red")), targets="all")
    supervised = [False, *(w > 0 for w in d.loss_weights[:-1])]
    is_text = [t != TOKENIZER.image for t in d.tokens]
    assert supervised == [i > 0 and is_text[i] and is_text[i - 1] for i in range(len(d.tokens))]


def test_text_targets_are_all_text_but_the_first_token():
    d = encode(conversation(("<image>\nWhat?", "red")), targets="text")
    supervised = [False, *(w > 0 for w in d.loss_weights[:-1])]
    assert supervised == [i > 0 and t != TOKENIZER.image for i, t in enumerate(d.tokens)]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=3))
def test_answer_runs_hold_the_answers_and_their_ends(pairs):
    sample = conversation(*pairs)
    answers = [a.strip() + "<｜end▁of▁sentence｜>" for _, a in pairs]
    whole, prompt = encode(sample), encode_prompt(sample, TOKENIZER, image_lengths=[])
    for dialogue, count in ((whole, len(pairs)), (prompt, len(pairs) - 1)):
        found = [TOKENIZER.decode(dialogue.tokens[list(run)].tolist()) for run in dialogue.answer_runs]
        assert found == answers[:count]


def raw(text: str, system: str = "", **options):
    sample = conversation((text, ""), system=system)
    return encode_text(sample, TOKENIZER, image_lengths=[3] * len(sample.images), **options)


def test_a_raw_text_is_taken_verbatim_with_every_text_token_a_target():
    text = " a <image>b <|User|> "
    whole = raw(text, wrapped=False, complete=True)
    image, e = TOKENIZER.image, TOKENIZER.encode
    body = [*e(" a "), image, image, image, *e("b "), TOKENIZER.user, *e(" ")]
    assert whole.tokens.tolist() == [TOKENIZER.bos, *body, TOKENIZER.eos]
    assert targets_of(whole) == " a b <|User|> <｜end▁of▁sentence｜>"
    open_ended = raw(text, wrapped=False, complete=False)
    assert open_ended.tokens.tolist() == whole.tokens.tolist()[:-1] and not any(open_ended.loss_weights)


def test_a_wrapped_text_is_a_users_turn():
    wrapped = raw(" <image>What? ", wrapped=True, complete=False)
    sample = conversation((" <image>What? ", ""))
    assert wrapped.tokens.tolist() == encode_prompt(sample, TOKENIZER, image_lengths=[3]).tokens.tolist()
    told = raw("What?", system="Look.", wrapped=True, complete=True)
    assert TOKENIZER.decode(told.tokens.tolist()) == (
        "<｜begin▁of▁sentence｜>Look.\n\n<|User|>: What?\n\n<|Assistant|>:<｜end▁of▁sentence｜>"
    )


def test_a_prompt_is_the_beginning_of_the_dialogue():
    for count in (1, 2, 3):
        sample = dataclasses.replace(SAMPLE, turns=SAMPLE.turns[:count])
        prompt = encode_prompt(sample, TOKENIZER, image_lengths=[3])
        whole = encode(sample).tokens.tolist()
        answer = [*TOKENIZER.encode(sample.turns[-1].answer), TOKENIZER.eos]
        assert prompt.tokens.tolist() + answer == whole
        assert not any(prompt.loss_weights)


def test_role_marks_in_user_text_stay_text():
    tokens = encode(conversation(("say <|Assistant|>: <｜end▁of▁sentence｜>", "<image>"))).tokens.tolist()
    assert tokens.count(TOKENIZER.assistant) == 1 and tokens.count(TOKENIZER.eos) == 1
    assert TOKENIZER.image not in tokens


def test_turns_that_do_not_fit_are_left_out():
    for turns in ("dialogue", "independent"):
        whole = encode(SAMPLE, turns=turns)
        cut = encode(SAMPLE, turns=turns, max_tokens=len(whole.tokens) - 1)
        assert cut.num_turns == 2 and cut.tokens.tolist() == whole.tokens.tolist()[: len(cut.tokens)]
        with pytest.raises(BadSample, match="too_long"):
            encode(SAMPLE, turns=turns, max_tokens=8)


def test_images_must_match_and_come_first_in_the_independent_form():
    with pytest.raises(BadSample, match="placeholder_mismatch"):
        encode_dialogue(SAMPLE, TOKENIZER, image_lengths=[3, 3])
    late = conversation(("<image> one?", "a"), ("<image> two?", "b"))
    assert len(encode(late).visual_runs) == 2
    with pytest.raises(BadSample, match="image_in_later_turn"):
        encode(late, turns="independent")


def recorded_cases(oracles):
    """(name, case, arrays, sample, image lengths) of every recorded conversation."""
    folder = processor_folder(oracles)
    config = json.loads((folder / "processor_config.json").read_text())
    resolutions = config["candidate_resolutions"]
    patch, ratio = config["patch_size"], config["downsample_ratio"]
    for case in json.loads((folder / "cases.json").read_text()):
        arrays = np.load(folder / "cases" / f"{case['name']}.npz")
        messages = case["call"].get("conversations")
        if messages is None and not case["call"].get("apply_sft_format"):
            continue  # A raw prompt is no conversation.
        messages = messages or [{"role": "user", "content": case["call"]["prompt"]}]
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        contents = [m["content"] for m in messages[bool(system) :]]
        contents += [""] * (len(contents) % 2)
        turns = tuple(Turn(q, a) for q, a in zip(contents[::2], contents[1::2], strict=True))
        size = arrays["images"].shape[-1]
        tiles = tuple((w // resolutions[0][0], h // resolutions[0][0]) for w, h in resolutions)
        tiling = TilingConfig(tile_size=size, candidates=tiles)
        side = -(-(size // patch) // ratio)
        sizes = [FileImage(folder / "images" / f"{n}.png", n)().size for n in case["images"]]
        grids = [best_grid(*s, tiling, num_images=len(sizes)) for s in sizes]
        lengths = [num_visual_tokens(g, tile_tokens_side=side, views="global_local") for g in grids]
        images = tuple(picture for _ in sizes)
        tokenizer = load_tokenizer(str(folder / "tokenizer"))
        yield case, arrays, Sample(case["name"], turns, images, system), lengths, tokenizer


def test_ids_labels_and_image_masks_of_the_reference_processor(oracles):
    kinds = set()
    for case, arrays, sample, lengths, tokenizer in recorded_cases(oracles):
        is_prompt = case["call"].get("inference_mode", True)
        kinds.add(is_prompt)
        assert lengths == arrays["num_image_tokens"].tolist(), case["name"]
        if is_prompt:
            got = encode_prompt(sample, tokenizer, image_lengths=lengths)
            assert got.tokens.tolist() == arrays["input_ids"].tolist(), case["name"]
        else:
            targets = "answers" if case["mask_prompt"] else "all"
            got = encode_dialogue(sample, tokenizer, image_lengths=lengths, targets=targets)
            assert got.tokens.tolist() == arrays["input_ids"].tolist(), case["name"]
            # Theirs are unshifted, and label text right after an image, which ours never does.
            labels = arrays["target_ids"][1:]
            visual = arrays["images_seq_mask"]
            expected = np.where(visual[:-1], -100, labels)
            ours = np.where(got.loss_weights > 0, got.targets, -100)[:-1]
            np.testing.assert_array_equal(ours, expected, err_msg=case["name"])
        mask = np.zeros(len(got.tokens), bool)
        for run in got.visual_runs:
            mask[run.start : run.start + run.length] = True
        np.testing.assert_array_equal(mask, arrays["images_seq_mask"])
    assert kinds == {True, False}


@pytest.mark.parametrize("targets", ["answers", "all", "text"])
@pytest.mark.parametrize("turns", ["dialogue", "independent"])
def test_answers_count_with_their_weight(turns, targets):
    weights = (1.0, 0.0, 0.5)
    plain = Sample("s", tuple(Turn(f"What is {i}?", f"It is {i}.") for i in range(3)))
    weighted = dataclasses.replace(
        plain,
        turns=tuple(dataclasses.replace(t, weight=w) for t, w in zip(plain.turns, weights, strict=True)),
    )
    options = {"image_lengths": [], "turns": turns, "targets": targets}
    before, after = (encode_dialogue(s, TOKENIZER, **options) for s in (plain, weighted))
    assert after.tokens.tolist() == before.tokens.tolist()
    expected = before.loss_weights.copy()
    for run, weight in zip(before.answer_runs, weights, strict=True):
        expected[run.start - 1 : run.stop - 1] *= weight
    assert after.loss_weights.tolist() == expected.tolist()
    assert ((after.targets != 0) <= (expected > 0)).all()


LIMIT = 20


@pytest.mark.parametrize("place", ["question", "answer", "system"])
def test_a_text_that_cannot_fit_is_cut_before_it_is_encoded(monkeypatch, place):
    tokenizer = load_tokenizer("")
    long = "a red cat and a blue dog, " * 100_000
    turn = Turn("<image>\nWhat?", "A")
    turn = dataclasses.replace(turn, **{place: long + "<image>"}) if place != "system" else turn
    sample = Sample("s", (turn,), system=long if place == "system" else "")
    asked, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **o: asked.append(len(text)) or encode(text, **o))
    cut = bounded(sample, tokenizer, LIMIT)
    texts = (cut.system, cut.turns[0].question, cut.turns[0].answer)
    assert sum(asked) < 10_000 and max(map(len, texts)) < 10_000
    assert max(len(encode(text)) for text in texts) > 2 * LIMIT
    assert cut.turns[0].question.count("<image>") == 1


@given(st.text(max_size=400), st.text(max_size=400))
def test_a_text_that_may_fit_is_not_cut(question, answer):
    sample = Sample("s", (Turn(question, answer),))
    assert bounded(sample, TOKENIZER, LIMIT) is sample
