"""``tokenizer``: trains a byte-level BPE vocabulary."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--input", required=True, nargs="+", help="text files, or JSONL with a 'text' field")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--out", required=True, type=Path)


def run(arguments: argparse.Namespace) -> None:
    """Writes the vocabulary and prints where it is."""
    from vl_jax.data.tools.vocabulary import train_tokenizer

    train_tokenizer(arguments.input, vocab_size=arguments.vocab_size, out=arguments.out)
    print(arguments.out)
