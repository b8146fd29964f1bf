"""Why records cannot be used, in words: what the reason that counters group by means, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

_WORDS = {
    "placeholder_mismatch": "the questions have more or fewer <image> marks than the record has pictures; "
    "write <image> once for each picture, where it belongs",
    "bad_conversation": "the record is no conversation of a known form; it needs question and answer, or "
    "conversations, messages or text",
    "missing_image": "a picture is not where the record says; names are relative to the folder of the record "
    "file, or to root of the source",
    "bad_image_field": "image must be the path of a file; nothing is fetched",
    "outside_root": "a path leaves the folder of the pictures; name it relative to that folder, or set root "
    "of the source",
    "corrupt_image": "a picture cannot be decoded",
    "image_too_large": "a picture has more pixels than max_pixels of the source",
    "too_long": "not even the first question and its answer fit; raise data.max_tokens",
    "too_many_targets": "an answer is longer than data.max_answer_tokens",
    "too_many_tiles": "the pictures of a record need more tiles than there is room for; raise "
    "data.max_tiles, or lower data.tiling.max_tiles",
    "image_in_later_turn": "a later question brings its own picture; set data.conversation.turns='dialogue'",
    "not_json": "the record is not JSON",
    "not_utf8": "the text is not UTF-8; save it as UTF-8",
    "missing_field": "a field that the config names is not in the record",
    "no_record": "a picture has no text beside it",
    "no_labels": "nobody has labelled it",
    "bad_media": "an input has another shape than its tower reads",
    "not_finite": "an input holds what is no finite number; leave such records out, or fill the gaps",
    "wrong_rate": "a sound has another rate than the config says; set resample=True of its medium",
    "resampled": "its rate is another than that of the config, to which it is brought",
    "bad_rate": "the record does not say how many steps a second its series has",
    "missing_audio": "a sound is not where the record says; names are relative to the folder of the record "
    "file, or to root of the source",
    "no_frames": "a clip has no frame; pictures in its folder end in .jpg or .png, for example",
    "no_affine": "a volume does not say which way it lies, nor how large its voxels are; set "
    "affine='ignored' of its medium where that does not matter",
    "missing_package": "a file needs a package that is not installed",
    "no_negative": "no wrong text can be made of the text by a rule; the record is used without one",
}


def in_words(reason: str) -> str:
    """What a reason means, and what to do; the reason itself without its underscores where that says it."""
    plain = reason.replace("_", " ")
    return f"{plain}: {_WORDS[reason]}" if reason in _WORDS else plain


def summary(counts: Mapping[str, int]) -> str:
    """How many records there are of each reason, and what the most frequent one means."""
    (first, count), *others = sorted(counts.items(), key=lambda item: -item[1])
    rest = [f"{number:,} x {reason.replace('_', ' ')}" for reason, number in others]
    return "; ".join([f"{count:,} x {in_words(first)}", *rest])
