"""The command line: every mistake of a user is one line and exit status 2, and help shows an example."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from vl_jax import cli, runs
from vl_jax.config import load
from vl_jax.data.tools import examination
from vl_jax.schema import to_json

pytest.importorskip("ml_collections")  # experiment files return its ConfigDict

TINY = str(Path(__file__).parent / "tiny_experiment.py")
CONFIG = f"--config={TINY}"


def refused(capsys, *argv: str) -> str:
    """The one line that a command which fails prints on stderr."""
    assert cli.main(list(argv)) == 2
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), captured.err
    assert "Traceback" not in captured.out
    return lines[0].removeprefix("error: ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.model.moe.topk=2"], "config.model.moe has no field 'topk'; did you mean 'top_k'?"),
        (["--config.model.moe.top_k=5"], "config.model.moe: top_k=5 must be from 1 to num_experts=4"),
        (["--config.seed=many"], "config.seed=many: expected int"),
        (["--config.stages.frist.steps=3"], "config.stages has no field 'frist'; did you mean 'first'?"),
        (["--config.stages.first=3"], "config.stages.first is a group, set one of its fields: "),
        (
            ["--config.model.fusion.kind=gate"],
            "config.model.fusion.kind='gate': expected one of 'prefix', 'gated'",
        ),
        (
            ["--config.mesh.data=3"],
            "config.mesh: data=3 x fsdp=1 x expert=1 x tensor=1 does not divide the 8 device(s)",
        ),
        (
            ["--config.stages.first.batch_size=12"],
            "config.stages.first.batch_size=12: 12 rows do not divide by the 8 batch shards of the mesh",
        ),
        (
            ["--config.evaluation.batch_size=3"],
            "config.evaluation.batch_size=3: 3 rows do not divide by the 8 batch shards of the mesh",
        ),
        (
            ["--config.stages.second.sources=('scene',)"],
            "config: stages.second.sources names 'scene'; data.sources has scenes",
        ),
        (
            ["--config.stages.second.trainable=('adaptor/.*',)"],
            "stages.second.trainable: pattern 'adaptor/.*' matches no parameter; top-level names: adapter",
        ),
        (
            ["--config.data.tiling.tile_size=64"],
            "config: data.tiling.tile_size=64 differs from the images of model.encoder, 32 x 32",
        ),
        (
            ["--config.model.language.vocab_size=100"],
            "vocab_size=100 of the model: the tokenizer has 2048 entries",
        ),
        (["--config.data.tokenizer=missing.json"], "missing.json"),
    ],
)
def test_a_bad_option_is_one_line_before_anything_is_written(capsys, tmp_path, overrides, message):
    error = refused(capsys, "train", CONFIG, f"--workdir={tmp_path / 'run'}", *overrides)
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_missing_experiment_file_is_named(capsys, tmp_path):
    error = refused(capsys, "train", "--config=nowhere.py", f"--workdir={tmp_path}")
    assert error == "--config=nowhere.py: no such file"


def test_a_file_without_get_config_is_named(capsys, tmp_path):
    file = tmp_path / "empty.py"
    file.write_text("x = 1\n")
    assert refused(capsys, "inspect", "config", f"--config={file}").endswith("defines no get_config()")


def test_a_config_that_is_no_experiment_is_named(capsys, tmp_path):
    file = tmp_path / "other.py"
    file.write_text(
        "from vl_jax.sharding import MeshConfig\n\n\ndef get_config():\n    return MeshConfig()\n"
    )
    assert refused(capsys, "inspect", "config", f"--config={file}").endswith(
        "get_config() gave no Experiment"
    )


DATA_FILE = """
import dataclasses
import runpy
from vl_jax import config
from vl_jax import schema
from vl_jax.data.sources.llava import LlavaConfig

def get_config():
    experiment = schema.rebuild(runpy.run_path({tiny!r})["get_config"]())
    source = LlavaConfig(name="mine", file="answers.json")
    data = dataclasses.replace(experiment.data, root={root!r}, sources=(source,))
    return dataclasses.replace(experiment, data=data)
"""


@pytest.mark.parametrize("exists", [False, True], ids=["no folder", "no file"])
def test_missing_data_is_named(capsys, tmp_path, exists):
    root = tmp_path / "data"
    if exists:
        root.mkdir()
    file = tmp_path / "mine.py"
    file.write_text(DATA_FILE.format(tiny=TINY, root=str(root)))
    error = refused(capsys, "train", f"--config={file}", f"--workdir={tmp_path / 'run'}")
    assert str(root) in error and "answers.json" in error


def test_a_folder_with_another_run_is_left_alone(capsys, tmp_path):
    text = to_json(load(TINY))
    (tmp_path / "config.json").write_text(text)
    error = refused(capsys, "train", CONFIG, f"--workdir={tmp_path}", "--config.seed=1")
    assert f"--workdir={tmp_path} holds a run with another configuration (differs at config.seed)" in error
    assert (tmp_path / "config.json").read_text() == text


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    tree = json.loads(to_json(load(TINY, [("loop.churn", "False")])))
    del tree["loop"]["churn"]  # it did not exist then
    (tmp_path / "config.json").write_text(json.dumps(tree))
    runs._claim(load(TINY, [("loop.churn", "False")]), tmp_path)
    assert "churn" in (tmp_path / "config.json").read_text()
    runs._claim(load(TINY), tmp_path)  # how often things happen may change
    with pytest.raises(
        ValueError, match=r"differs at config.seed\): config.seed is 0 there and 1 here; .*--config.init="
    ):
        runs._claim(load(TINY, [("seed", "1")]), tmp_path)


def test_a_report_of_a_folder_without_a_run_is_refused(capsys, tmp_path):
    assert str(tmp_path) in refused(capsys, "report", f"--workdir={tmp_path / 'nothing'}")


def test_a_published_model_is_evaluated_on_tasks_of_an_experiment(capsys, tmp_path):
    error = refused(capsys, "evaluate", f"--model={tmp_path}", f"--workdir={tmp_path / 'out'}")
    assert error == "--model and --config go together: the experiment file says what --model is asked"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", CONFIG], "--workdir"),
        (["train", CONFIG, "--workdir=x", "--steps=4"], "overrides look like --config.model.moe.top_k=4"),
        (["train", CONFIG, "--workdir=x", "--config.seed"], "--config.seed needs a value"),
        (["tran"], "invalid choice: 'tran'"),
        (["inspect", "weights", CONFIG], "invalid choice: 'weights'"),
    ],
)
def test_a_bad_command_line_exits_2_and_says_why(capsys, argv, message):
    with pytest.raises(SystemExit) as exit_:
        cli.main(argv)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "command", ["train", "inspect", "evaluate", "report", "generate", "convert", "tokenizer"]
)
def test_help_shows_an_example(capsys, command):
    with pytest.raises(SystemExit) as exit_:
        cli.main([command, "--help"])
    assert exit_.value.code == 0
    assert f"example: python -m vl_jax {command}" in capsys.readouterr().out.replace("\n  ", " ")


def test_traceback_is_shown_on_request(tmp_path):
    with pytest.raises(ValueError, match="expected int"):
        cli.main(["inspect", "config", CONFIG, "--config.seed=many", "--traceback"])


def test_inspect_config_prints_the_resolved_config(capsys):
    assert cli.main(["inspect", "config", CONFIG, "--config.seed", "7"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 7


def test_inspect_params_names_sizes_axes_stages_and_what_does_not_divide(capsys, monkeypatch, caplog):
    monkeypatch.setenv("COLUMNS", "200")
    options = [
        "--config.mesh.data=1",
        "--config.mesh.fsdp=4",
        "--config.mesh.tensor=2",
        "--config.model.encoder.mlp_dim=33",
    ]
    with caplog.at_level(logging.WARNING):
        assert cli.main(["inspect", "params", CONFIG, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "language/moe_layers/moe/w_in" in line)
    assert "1 x 4 x 16 x 2 x 8" in row and "experts" in row and "first, second" in row
    assert f"{4 * 16 * 2 * 8 * 4 // 8:,}" in row  # bytes on one of eight devices
    frozen = next(line for line in lines if "encoder/positions" in line)
    assert "second" in frozen and "first" not in frozen
    uneven = next(line for line in lines if "encoder/blocks/fc1/kernel" in line)
    assert "not divided: mlp=33" in uneven
    assert any("encoder/blocks/fc1/kernel: mlp=33 does not divide" in message for message in caplog.messages)


def test_a_single_gate_that_is_normalised_is_warned_of(capsys, caplog):
    options = ["--config.model.moe.top_k=1", "--config.model.moe.gates.normalize=True"]
    with caplog.at_level(logging.WARNING):
        assert cli.main(["inspect", "params", CONFIG, *options]) == 0
    assert any("set gates.normalize=False" in message for message in caplog.messages)


def test_convert_data_names_the_source_that_takes_the_other_s_place(capsys, tmp_path):
    pytest.importorskip("array_record")
    options = (f"--config.data.root={tmp_path}", "--source=heldout", f"--to={tmp_path / 'new'}")
    assert cli.main(["convert-data", CONFIG, *options]) == 0
    printed = capsys.readouterr().out
    assert "4 records" in printed and "ArrayRecordConfig(name='heldout', file='new/*.arrayrecord'" in printed
    assert "known: heldout, scenes" in refused(capsys, "convert-data", CONFIG, "--source=x", "--to=y")


def test_a_conversion_of_which_nothing_is_left_says_why(capsys, tmp_path):
    pytest.importorskip("array_record")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    (tmp_path / "train.json").write_text(
        json.dumps([{"id": "7", "image": "gone.png", "conversations": turns}])
    )
    config = Path(__file__).parent.parent / "experiments/easy_vqa.py"
    options = (f"--config={config}", f"--config.data.root={tmp_path}", "--source=train")
    message = refused(capsys, "convert-data", *options, f"--to={tmp_path / 'new'}")
    assert "no record can be used" in message and "sample 7" in message and "[missing_image]" in message


@pytest.mark.parametrize("name", ["step", "decode", "routing"])
def test_a_config_for_a_benchmark_that_reads_none_is_refused(capsys, name):
    assert refused(capsys, "benchmark", name, CONFIG).startswith(f"benchmark {name} takes no --config")
    assert "takes no --config" in refused(capsys, "benchmark", name, "--config.seed=1")


def test_inspect_data_plans_the_rows_of_stages_that_draw_alike_once(capsys, monkeypatch):
    calls, padding = [], examination.padding

    def counted(*args, **options):
        calls.append(options)
        return padding(*args, **options)

    monkeypatch.setattr(examination, "padding", counted)
    targets = "--config.stages.first.targets=answers"
    assert cli.main(["inspect", "data", CONFIG, targets, "--examine=20", "--samples=1"]) == 0
    assert capsys.readouterr().out.count("padding of stage") == 2 and len(calls) == 1


def test_inspect_data_prints_samples_and_writes_the_page(capsys, tmp_path):
    page = tmp_path / "page.html"
    assert cli.main(["inspect", "data", CONFIG, "--samples=1", "--examine=20", f"--html={page}"]) == 0
    out = capsys.readouterr().out
    assert "scenes" in out and "heldout" in out
    assert "<html" in page.read_text(encoding="utf-8")
