"""A source without the pairs that a trained model finds least alike."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

from vl_jax import schema
from vl_jax.data.sample import BadSample
from vl_jax.data.sources.build import BestPairsConfig, open_source
from vl_jax.data.sources.filters.best_pairs import BestPairs
from vl_jax.data.sources.scenes import ScenesConfig, SceneTextsConfig
from vl_jax.train.objectives.contrastive import ContrastivePairs, best_pairs, kept_of


def scenes(count: int = 10, **options) -> SceneTextsConfig:
    return SceneTextsConfig("texts", ScenesConfig("scenes", count), pictures=True, **options)


def scored(file, source, score=lambda number: number) -> None:
    lines = [json.dumps({"id": source[i].id, "similarity": score(i)}) for i in range(len(source))]
    file.write_text("\n".join(lines) + "\n")


def test_the_lowest_share_is_left_out_and_counted(tmp_path):
    source, file = scenes().open(""), tmp_path / "scores.jsonl"
    scored(file, source, lambda number: -number)
    config = BestPairsConfig("best", scenes(), "scores.jsonl", drop=0.25)
    assert schema.from_json(schema.to_json(config), BestPairsConfig) == config
    found = open_source(config, root=str(tmp_path))
    assert [found[i].id for i in range(len(found))] == [source[i].id for i in range(8)]
    (stray,) = found.strays
    assert (stray.reason, stray.count) == ("ill_matched", 2) and file in found.files
    assert len(open_source(dataclasses.replace(config, drop=0.0), root=str(tmp_path))) == 10


def test_mixed_up_scenes_are_those_that_a_perfect_score_leaves_out(tmp_path):
    config, file = scenes(200, mixed_up=0.3), tmp_path / "scores.jsonl"
    source = config.open("")
    wrong = [bool(source[i].labels.get("mixed_up")) for i in range(200)]
    assert 0.2 < sum(wrong) / 200 < 0.4
    clean = scenes(200).open("")
    for i in range(200):  # the picture is its own, the sentence another's
        assert source[i].images[0].scene == clean[i].images[0].scene
        assert wrong[i] or source[i].turns == clean[i].turns
    scored(file, source, lambda number: float(not wrong[number]))
    found = BestPairs(source, file, sum(wrong) / 200)
    assert not any(found[i].labels.get("mixed_up") for i in range(len(found)))


def test_what_cannot_be_read_stays(tmp_path):
    class Broken:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise BadSample("corrupt", "no")
            return scenes().open("")[index]

    file = tmp_path / "scores.jsonl"
    ids = [Broken()[i].id for i in (0, 2)]
    file.write_text("\n".join(json.dumps({"id": name, "similarity": i}) for i, name in enumerate(ids)))
    found = BestPairs(Broken(), file, 0.5)
    assert len(found) == 2 and found[1].id == ids[1]
    with pytest.raises(BadSample):
        found[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ('{"id": "a"}', "line 1: expected an object with id and similarity"),
        ('{"id": "a", "similarity": NaN}', "a similarity no number"),
        ('{"id": "a", "similarity": 1}\n{"id": "a", "similarity": 2}', "an id that stood before"),
        ('{"id": "a", "similarity": 1}', "has no similarity of sample 'scene-0-0'"),
    ],
)
def test_bad_scores_are_one_line(tmp_path, content, message):
    file = tmp_path / "scores.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=message) as raised:
        BestPairs(scenes().open(""), file, 0.5)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="drop=1"):
        BestPairsConfig("best", scenes(), "scores.jsonl", drop=1.0)


def test_the_pairs_of_a_batch_that_agree_least_count_in_no_loss():
    nearness = jnp.asarray([0.1, 0.9, -0.5, 0.3, 0.2, 0.0])
    there = jnp.asarray([True, True, False, True, True, True])
    for drop, kept in ((0.0, [0, 1, 3, 4, 5]), (0.2, [0, 1, 3, 4]), (0.4, [1, 3, 4]), (0.39, [0, 1, 3, 4])):
        found = best_pairs(nearness, there, drop)
        assert np.flatnonzero(found).tolist() == kept
        assert int(kept_of(jnp.sum(there), drop)) == len(kept)
    same = best_pairs(jnp.zeros(5), jnp.ones(5, bool), 0.4)  # no more are dropped where all are alike
    assert int(same.sum()) == 3
    with pytest.raises(ValueError, match="drop=1"):
        ContrastivePairs(drop=1.0)
