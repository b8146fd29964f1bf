"""Samples of two sources side by side."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from vl_jax import schema
from vl_jax.data.sample import TEXT, BadSample, Sample, Turn
from vl_jax.data.sources.build import MatchedConfig, ScenesConfig
from vl_jax.data.sources.filters.matched import Matched, SameKind

KINDS = (SameKind(("free",), ("normal",)), SameKind(("crack", "fray"), ("ball", "race")))


@dataclasses.dataclass
class Listed:
    """Samples with a label of one name."""

    name: str
    values: tuple
    medium: str
    text: str = ""

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        if self.values[index] is None:
            raise BadSample("broken", f"sample {index}")
        return Sample(
            f"{self.medium}{index}",
            (Turn("", self.text, kind=TEXT),),
            labels={self.name: self.values[index], "side": self.medium},
            media={self.medium: lambda: np.array([index])},
        )


TILES = Listed("label", ("free", "crack", "fray") * 200, "tile")
SERIES = Listed("fault", ("normal", "ball", "race", None, "other"), "series")


def matched(first=TILES, second=SERIES, agreement=1.0, seed=0, partners=1):
    return Matched(
        first,
        second,
        labels=("label", "fault"),
        kinds=KINDS,
        agreement=agreement,
        seed=seed,
        partners=partners,
    )


def of_one_kind(sample: Sample) -> bool:
    return (sample.labels["label"] == "free") == (sample.labels["fault"] == "normal")


@pytest.mark.parametrize("agreement", [0.0, 0.7, 1.0])
def test_two_are_of_one_kind_at_the_rate_of_agreement(agreement):
    found = [matched(agreement=agreement)[i] for i in range(600)]
    share = sum(map(of_one_kind, found)) / 600
    assert abs(share - agreement) <= (0.06 if 0 < agreement < 1 else 0)
    assert {s.labels["fault"] for s in found} == {"normal", "ball", "race"}  # neither broken nor of no kind
    assert all(set(s.media) == {"tile", "series"} and s.labels["side"] == "tile" for s in found)


def test_the_partner_follows_from_seed_and_sample_alone():
    ids = [matched(agreement=0.5)[i].id for i in range(600)]
    assert ids == [matched(agreement=0.5)[i].id for i in range(600)]
    assert ids != [matched(agreement=0.5, seed=1)[i].id for i in range(600)]
    some = dataclasses.replace(TILES, values=TILES.values[:7])
    assert [matched(some, agreement=0.5)[i].id for i in range(7)] == ids[:7]


def test_a_sample_comes_with_several_partners_by_turns():
    found = matched(agreement=0.5, partners=3)
    assert len(found) == 1800 and found[0].media["tile"]() == found[1200].media["tile"]()
    assert [found[i].id for i in range(600)] == [matched(agreement=0.5)[i].id for i in range(600)]
    assert len({found[0].id, found[600].id, found[1200].id}) > 1 or found[3].id != found[603].id
    with pytest.raises(IndexError, match="pair 1800 of 1800"):
        found[1800]


def test_a_row_takes_the_text_that_there_is_and_no_two():
    spoken = dataclasses.replace(SERIES, text="a low hum")
    assert matched(second=spoken)[0].turns == (Turn("", "a low hum", kind=TEXT),)
    both = matched(first=dataclasses.replace(TILES, text="a tile"), second=spoken)
    with pytest.raises(BadSample, match="both have a text"):
        both[0]


def test_what_cannot_be_matched_is_bad_and_counted():
    found = matched(first=dataclasses.replace(TILES, values=("free", "stain", None)))
    assert found[0].labels["fault"] == "normal" and len(found) == 3
    with pytest.raises(BadSample, match="'stain' is of no kind"):
        found[1]
    with pytest.raises(BadSample, match="sample 2"):
        found[2]


def test_impossible_pairs_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"no sample of the second source has fault in \('ball', 'race'\)"):
        matched(second=dataclasses.replace(SERIES, values=("normal",)))
    scenes = ScenesConfig("scenes", 4)
    config = MatchedConfig("pairs", scenes, scenes, ("label", "fault"), KINDS)
    assert schema.from_json(schema.to_json(config), MatchedConfig) == config
    for change, rule in (
        ({"agreement": 1.1}, "agreement=1.1"),
        ({"kinds": ()}, "0 kinds"),
        ({"partners": 0}, "partners=0"),
        ({"kinds": (*KINDS, SameKind(("new",), ("ball",)))}, "second 'ball' is of two kinds"),
    ):
        with pytest.raises(ValueError, match=rule):
            dataclasses.replace(config, **change)
