"""Texts that are written for samples by a label of theirs."""

from __future__ import annotations

import dataclasses

import pytest

from vl_jax import schema
from vl_jax.data.sample import TEXT, BadSample, Sample, Turn
from vl_jax.data.sources.build import ScenesConfig, WrittenConfig
from vl_jax.data.sources.filters.written import Wording, Written

WORDINGS = (Wording("0", ("fine", "well")), Wording("1", ("ill", "sore")), Wording("2", ("gone",)))


class Numbered:
    def __len__(self):
        return 900

    def __getitem__(self, index):
        return Sample(f"s{index}", (Turn("<image>\n", "", kind=TEXT),), labels={"label": index % 4})


def written(agreement=1.0, seed=0):
    return Written(Numbered(), label="label", wordings=WORDINGS, agreement=agreement, seed=seed)


@pytest.mark.parametrize("agreement", [0.0, 0.7, 1.0])
def test_a_text_fits_at_the_rate_of_agreement(agreement):
    texts = {wording.label: wording.texts for wording in WORDINGS}
    found = [written(agreement)[i] for i in range(900) if i % 4 < 3]
    assert all(s.turns[0].question == "<image>\n" for s in found)
    fits = [s.turns[0].answer in texts[str(s.labels["label"])] for s in found]
    assert abs(sum(fits) / len(fits) - agreement) <= (0.06 if 0 < agreement < 1 else 0)
    assert {s.turns[0].answer for s in found} == {text for of in texts.values() for text in of}


def test_a_text_follows_from_seed_and_sample_alone():
    texts = [written(0.5)[i].turns for i in range(0, 900, 4)]
    assert texts == [written(0.5)[i].turns for i in range(0, 900, 4)]
    assert texts != [written(0.5, seed=1)[i].turns for i in range(0, 900, 4)]


def test_what_nothing_is_written_for_is_bad_and_mistakes_are_refused():
    with pytest.raises(BadSample, match="nothing is written for label='3'"):
        written()[3]
    config = WrittenConfig("w", ScenesConfig("scenes", 4), "label", WORDINGS)
    assert schema.from_json(schema.to_json(config), WrittenConfig) == config
    for change, rule in (
        ({"agreement": -0.1}, "agreement=-0.1"),
        ({"wordings": WORDINGS[:1]}, "two labels at least"),
        ({"wordings": (*WORDINGS, WORDINGS[0])}, "all different"),
        ({"wordings": (*WORDINGS, Wording("3", ()))}, "every label needs a text"),
    ):
        with pytest.raises(ValueError, match=rule):
            dataclasses.replace(config, **change)
