"""The command line: every mistake of a user is one line and exit status 2, and help shows an example."""

from __future__ import annotations

import json
import logging
import random
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

import vl_jax
from vl_jax import cli, runs
from vl_jax.commands import completion
from vl_jax.commands import inspect as inspect_command
from vl_jax.commands.table import COMMANDS
from vl_jax.config import load, replace, view
from vl_jax.data.tools import examination
from vl_jax.runtime import errors, shipped
from vl_jax.schema import TYPE_KEY, to_json

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
@pytest.mark.slow
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


@pytest.mark.parametrize("command", COMMANDS)
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def mistaken(capsys, *argv: str) -> str:
    """The one line of a command line that cannot be read."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(list(argv))
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train", "--confg=x.py"], "unknown argument '--confg'; did you mean '--config'?"),
        (["train", "-workdir=x"], "unknown argument '-workdir'; did you mean '--workdir'?"),
        (["generate", "--max-tokens=3"], "did you mean '--max-new-tokens'?"),
        (["train", CONFIG, "--model.moe.top_k=4"], "did you mean '--config.model.moe.top_k'?"),
        (["train", CONFIG, "--confg.seed=4"], "did you mean '--config.seed'?"),
        (["tran", CONFIG], "did you mean 'train'?"),
        ([CONFIG, "train"], "the command comes first"),
        (["inspect", "parms", CONFIG], "invalid choice: 'parms'"),
    ],
)
def test_a_word_that_is_nearly_right_is_answered_with_the_right_one(capsys, argv, message):
    assert message in mistaken(capsys, *argv)


REFUSES = {
    "report": ["--workdir=x"],
    "tokenizer": ["--input", "x", "--out=y"],
    "generate": ["--workdir=x", "--prompt=y"],
    "predict": ["--workdir=x"],
    "convert": ["--from=x", "--to=y"],
    "new": ["x.py"],
    "prune": ["--workdir=x", "--to=y"],
    "completion": ["bash"],
}


def test_commands_that_read_no_experiment_refuse_overrides_with_the_reason(capsys):
    assert REFUSES.keys() == {name for name, command in COMMANDS.items() if command.no_overrides}
    for name, options in REFUSES.items():
        message = mistaken(capsys, name, *options, "--config.seed=1")
        assert f"{name} takes no overrides such as --config.seed: {COMMANDS[name].no_overrides}" in message


def test_without_a_command_there_is_help_and_the_version_is_told(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS) and "example: " in shown
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0 and f"vl_jax {vl_jax.__version__} (jax " in capsys.readouterr().out


@pytest.mark.parametrize("what", ["config", "params", "data", "routing"])
def test_inspect_refuses_an_option_that_it_would_not_read(capsys, what):
    option = CONFIG if what == "routing" else "--workdir=x"
    assert f"inspect {what} does not read --{option[2:].split('=')[0]}; it reads" in refused(
        capsys, "inspect", what, option
    )


@pytest.mark.parametrize("content", [{}, {"config.json": '{"model_type": "clip"}'}, {"notes.txt": "x"}])
def test_a_report_of_a_folder_that_holds_no_run_is_refused_and_nothing_written(capsys, tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    assert f"--workdir={tmp_path} holds no run" in refused(capsys, "report", f"--workdir={tmp_path}")
    assert {path.name for path in tmp_path.iterdir()} == content.keys()


def test_a_report_of_an_unfinished_run_is_written(capsys, tmp_path):
    (tmp_path / "config.json").write_text(to_json(load(TINY)))
    assert cli.main(["report", f"--workdir={tmp_path}"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")


# Where the error is -> the file, and what is said; line numbers are those of the file.
FAULTY = {
    "in get_config": (
        "def get_config():\n    layers = 4\n    return layers / 0\n",
        "mine.py:3: ZeroDivision",
    ),
    "at the top": ("import dataclasses\nassert dataclasses is None, 'no'\n", "mine.py:2: AssertionError: no"),
    "syntax": ("def get_config():\n    return (\n", "mine.py:2: SyntaxError"),
    "in the package": (
        "from vl_jax.train.stages import Stage\n\n\ndef get_config():\n    return Stage('a', steps=0)\n",
        "mine.py:5: ValueError: steps=0",
    ),
    "in the library": ("import json\n\njson.loads('{')\n", "mine.py:3: JSONDecodeError"),
    "in another file": ("import cli_helper\n", "cli_helper.py:4: KeyError: 'x'"),
    "exit": ("import sys\nsys.exit('away')\n", "mine.py:2: SystemExit: away"),
}


@pytest.mark.parametrize("way", ["relative", "absolute", "link"])
@pytest.mark.parametrize("kind", FAULTY)
def test_an_error_in_an_experiment_file_names_its_line(capsys, tmp_path, monkeypatch, kind, way):
    source, message = FAULTY[kind]
    (tmp_path / "mine.py").write_text(source)
    (tmp_path / "cli_helper.py").write_text("\n\ndef f(d):\n    return d['x']\nf({})\n")
    (tmp_path / "link").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    path = {"relative": "mine.py", "absolute": tmp_path / "mine.py", "link": "link/mine.py"}[way]
    error = refused(capsys, "inspect", "config", f"--config={path}")
    assert error.startswith(f"--config={path}:") and message in error


OWN_ENCODER = """
import dataclasses
import flax.linen as nn
import jax.numpy as jnp
from vl_jax.encoders.transformer import Encoded

class Broken(nn.Module):
    @nn.compact
    def __call__(self, pixels, valid=None, routing_state=None):
        return {call}

@dataclasses.dataclass(frozen=True)
class Own:
    width: int = 8
    output_dim = property(lambda self: self.width)
    num_tokens = 16
    num_features = 8
    grid = 4
    input_shape = (32, 32, 3)
    stack = None

    def __post_init__(self):
        {rule}

    def build(self, dtype, *, remat):
        return Broken()
"""


@pytest.mark.parametrize(
    ("call", "rule", "message"),
    [
        ("missing", "pass", "encoder.py:10: NameError: name 'missing'"),
        ("jnp.ones((2, 3)) @ jnp.ones((4, 5))", "pass", "encoder.py:10: TypeError: "),
        ("nn.Dense(-1)(pixels)", "pass", "encoder.py:10: "),
        (
            "0",
            "raise ValueError('width too small')",
            "encoder.py:23: config.model.encoder=encoder.py:Own: width too small",
        ),
        ("0", "self.nothing", "encoder.py:23: config.model.encoder=encoder.py:Own: AttributeError: "),
    ],
)
def test_an_error_in_an_encoder_of_ones_own_names_its_line(
    capsys, tmp_path, monkeypatch, call, rule, message
):
    (tmp_path / "encoder.py").write_text(OWN_ENCODER.format(call=call, rule=rule))
    monkeypatch.chdir(tmp_path)
    error = refused(capsys, "inspect", "params", CONFIG, "--config.model.encoder=encoder.py:Own")
    assert message in error


def test_a_fault_of_the_package_is_one_line_and_its_traceback_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(inspect_command, "load_experiment", None)
    assert cli.main(["inspect", "config", CONFIG]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    (file,) = tmp_path.iterdir()
    assert line.startswith("error: TypeError: ") and str(file) in line
    assert "Traceback" in file.read_text()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.slow
def test_inspect_params_fits_the_screen_and_names_every_parameter_whole(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    options = ("--config.mesh.data=1", "--config.mesh.fsdp=4", "--config.mesh.tensor=2")
    assert cli.main(["inspect", "params", CONFIG, *options, "--config.model.encoder.mlp_dim=33"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    first = next(n for n, line in enumerate(lines) if line.startswith("language/moe_layers/moe/w_in "))
    assert lines[first].endswith(f" {4 * 16 * 2 * 8 * 4 // 8:,}")
    assert "4 (experts > expert), 16 (embed > fsdp), 2, 8 (mlp > tensor)" in lines[first + 1]
    assert any("not divided: mlp=33" in line for line in lines)


def test_bash_completes_commands_options_and_choices():
    def complete(*words: str) -> list[str]:
        lines = [
            completion.script("bash"),
            f"COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}; _vl_jax",
            'printf "%s\\n" "${COMPREPLY[@]}"',
        ]
        shown = subprocess.run(
            ["bash", "-c", "\n".join(lines)], capture_output=True, text=True, check=True, timeout=20
        )
        return shown.stdout.split()

    assert complete("vl_jax", "con") == ["convert", "conformance", "convert-data"]
    assert complete("vl_jax", "train", "--w") == ["--workdir="]
    assert complete("vl_jax", "inspect", "p") == ["params"]
    assert complete("vl_jax", "train", "--config", "=", "ex") == []  # which leaves it to files


def test_zsh_is_told_of_every_command_and_option():
    script = completion.script("zsh")
    assert script.startswith("#compdef vl_jax") and all(f"\n    {name}) " in script for name in COMMANDS)
    assert "--workdir=[folder of the run]:value:_files" in script
    if shutil.which("zsh"):
        subprocess.run(["zsh", "-n"], input=script, text=True, check=True, timeout=20)


def test_new_copies_an_experiment_that_stands_by_itself(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in shipped.names():
        assert cli.main(["new", f"mine/{name}.py", f"--from={name}"]) == 0
        assert f"train --config=mine/{name}.py" in capsys.readouterr().out
        text = (tmp_path / "mine" / f"{name}.py").read_text()
        assert f"experiments/{name}.py" not in text and "__file__)" not in text
    assert refused(capsys, "new", "mine/quickstart.py").startswith("mine/quickstart.py exists already")
    assert "call it mine.txt.py" in refused(capsys, "new", "mine.txt")
    mine, theirs = load("mine/easy_vqa.py"), load("easy_vqa")
    assert mine == theirs and load("mine/quickstart.py") == load("quickstart")


def test_a_name_that_is_no_file_is_answered_with_what_there_is(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    assert "did you mean 'quickstart'?" in refused(capsys, "inspect", "config", "--config=quikstart")
    assert "did you mean mine.py?" in refused(capsys, "inspect", "config", "--config=mne.py")


WORDS = (
    *COMMANDS,
    *(
        f"--{name}"
        for name in ("config", "workdir", "image", "json", "help", "traceback", "samples", "x", "")
    ),
    *(
        "=",
        "-",
        "--",
        "-1",
        "--config.",
        "--config..=",
        "--config=",
        "--config.seed",
        "--config.a.b=1",
        "\0",
        "é",
        "",
    ),
    *(
        "--config.seed=\n",
        "--workdir=a b",
        "--workdir=\0",
        "a.py:b",
        "--repeats=x",
        "-h",
        "-x=3",
        "--config.seed=--x",
    ),
)


def test_command_lines_of_any_words_are_read_or_answered_in_one_line(capsys):
    chosen = random.Random(0)
    for _ in range(700):
        words = [chosen.choice(WORDS) for _ in range(chosen.randint(1, 5))]
        if chosen.random() < 0.7:
            words = [chosen.choice(tuple(COMMANDS)), *words]
        try:
            cli._parse(words)
        except SystemExit as exit_:
            shown = capsys.readouterr()
            assert exit_.code == 0 or (exit_.code == 2 and len(shown.err.splitlines()) == 1), (words, shown)


VALUES = (
    *(
        "",
        "0",
        "-1",
        "1e999",
        "nan",
        "None",
        "True",
        "((((",
        "[]",
        "{[]:1}",
        "()",
        "('a',)",
        "\0",
        "9" * 50,
        "(" * 500,
    ),
    *(
        "'",
        "x.py:Y",
        "/tmp",
        ":",
        "1j",
        "b'a'",
        "...",
        "Labels",
        "Apart",
        "((1,2),(3,))",
        "(('a', 1),)",
        "('[',)",
    ),
)


def paths_of(node, prefix: str = "") -> list[str]:
    """All dotted paths of a view."""
    names = [name for name in node.keys() if name != TYPE_KEY] if hasattr(node, "keys") else []
    return [path for name in names for path in (prefix + name, *paths_of(node[name], f"{prefix}{name}."))]


@pytest.mark.slow
def test_overrides_with_any_value_are_taken_or_answered_in_one_line():
    experiment, chosen = load(TINY), random.Random(0)
    paths = paths_of(view(experiment))
    for _ in range(80):
        path = chosen.choice(paths)
        path = chosen.choice((path, path, path, f"{path}.x", f"{path}.", path[:-1], path.replace(".", "..")))
        pair = (path, chosen.choice(VALUES))
        try:
            assert isinstance(replace(experiment, [pair]), type(experiment))
        except ValueError as error:
            assert errors.one_line(error), pair


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder.mlp_dim=-1", "config.model: no model can be built of these sizes: TypeError: "),
        (
            "model.adapter.num_layers=9" + "9" * 40,
            "config.model: no model can be built of these sizes: Overflow",
        ),
    ],
)
def test_sizes_of_which_no_model_can_be_built_are_the_user_s_mistake(capsys, override, message):
    assert refused(capsys, "inspect", "params", CONFIG, f"--config.{override}").startswith(message)


@pytest.mark.slow
def test_inspect_params_draws_a_mesh_that_is_not_here(capsys, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("COLUMNS", "220")
    page = tmp_path / "params.html"
    with caplog.at_level(logging.WARNING):
        assert cli.main(["inspect", "params", CONFIG, "--mesh=fsdp=16,expert=4", f"--html={page}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "language/moe_layers/moe/w_in" in line)
    assert "1 x 4 x 16 x 1 x 1" in row and f"{4 * 16 * 2 * 8 * 4 // 64:,}" in row
    assert any("data=1 x fsdp=16 x expert=4 x tensor=1" in line for line in lines)
    assert any("8 rows do not divide by 64 batch shards" in message for message in caplog.messages)
    text = page.read_text()
    assert text.count("<svg") == text.count("<tr><th><code>") > 10
    assert "--mesh=fsdp=0: " in refused(capsys, "inspect", "params", CONFIG, "--mesh=fsdp=0")
    assert "does not read --mesh" in refused(capsys, "inspect", "config", CONFIG, "--mesh=fsdp=2")
