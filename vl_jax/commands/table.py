"""What commands there are: each has a file of its name beside this one."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Command:
    """What the command line says of a command before it reads its file."""

    purpose: str
    example: str  # what stands after the name of the program
    no_overrides: str = ""  # why it takes no ``--config.a.b=value``; empty: it takes them
    light: bool = False  # it computes nothing, and needs no devices
    joins: bool = False  # it computes together with the other processes of a job


_FINISHED = "it reads what a run wrote, which does not change any more"

COMMANDS = {
    "train": Command(
        "Train the stages of an experiment, evaluate, write report.html; resumes the run of the folder.",
        "train --config=experiments/quickstart.py --workdir=runs/quickstart --config.seed=1",
        joins=True,
    ),
    "new": Command(
        "Copy an experiment of the package to a file of your own, to change it there.",
        "new my_experiment.py --from=quickstart",
        "it copies a file as it is; change the copy, or give overrides to train",
        light=True,
    ),
    "inspect": Command(
        "Show without training what would run: config, parameters, samples; or a run's routing.",
        "inspect params --config=experiments/quickstart.py",
    ),
    "fit": Command(
        "Rehearse a stage on a TPU slice that is not here: what fits, what is whole on every device by "
        "accident, what travels, how long a step takes at best.",
        "fit --config=experiments/deepseek_vl2_tiny.py --topology=v5e:4x4",
    ),
    "sweep": Command(
        "Train every variant that the sweeps of an experiment file name, or an ablation; compare them.",
        "sweep --config=experiments/quickstart.py --sweep=scheme --workdir=runs/schemes",
        joins=True,
    ),
    "evaluate": Command(
        "Answer held-out questions with the newest checkpoint of a run or a published one; print the scores.",
        "evaluate --workdir=runs/quickstart --task=heldout --config.evaluation.limit=100",
        joins=True,
    ),
    "report": Command(
        "Write the page of a run, of several or of an ablation anew; judge what was declared.",
        "report --workdir=runs/quickstart",
        _FINISHED,
        light=True,
    ),
    "generate": Command(
        "Answer a prompt about an image, with the newest checkpoint of a run or a published one.",
        "generate --workdir=runs/quickstart --image=scene.png --prompt='what colour is the circle?'",
        "the model is asked as it was trained; --max-new-tokens sets the length of the answer",
    ),
    "predict": Command(
        "Print what each head of a run says of a picture, sound or text: answer, classes, nearest texts.",
        "predict --workdir=runs/clothing --image=shirt.jpg",
        "the model is asked as it was trained",
    ),
    "convert": Command(
        "Convert a published folder (safetensors) to a checkpoint; or back, or a fine-tuned run; or one head "
        "of a run to a folder of its own.",
        "convert --from=deepseek-vl2-tiny --to=checkpoints/tiny",
        "it copies weights as they are, and reads no experiment",
    ),
    "prune": Command(
        "Write a run with fewer experts: the least harmful ones are left out, or merged into others.",
        "prune --workdir=runs/quickstart --to=runs/pruned --share=0.25",
        "it reads a run as it was trained; give overrides to train, which goes on with the result",
    ),
    "conformance": Command(
        "Check a routing scheme of one's own: gradients, equivariance, masking, causality, kernels, devices.",
        "conformance experiments/my_router.py:my_router --config.model.moe.options.push=0.3",
    ),
    "benchmark": Command(
        "Time a training step or decoding (beside transformers), routed experts (beside other ways), or an "
        "experiment's loader (beside Pillow and torch's DataLoader) or packed rows (beside a sample a row).",
        "benchmark step --json=step.json",
    ),
    "convert-data": Command(
        "Convert a source of an experiment to ArrayRecord files, images and all, and report what was "
        "left out; goes on where it was interrupted; with config.data.packing.index, measure lengths.",
        "convert-data --config=experiments/easy_vqa.py --source=train --to=data/easy_vqa",
    ),
    "tokenizer": Command(
        "Train a byte-level BPE vocabulary; the same input always gives the same file.",
        "tokenizer --input corpus.jsonl --vocab-size=2048 --out=tokenizer.json",
        "it reads text files and no experiment; --vocab-size sets the size",
        light=True,
    ),
    "completion": Command(
        "Print a script by which a shell completes commands and options.",
        'completion bash   # in ~/.bashrc: eval "$(vl_jax completion bash)"',
        "it describes the commands and reads no experiment",
        light=True,
    ),
}
