"""The code on the pages: blocks in their order, and the commands of a shell block, with what they lack.

A comment that ends with one of ``LACKING`` says that the tests cannot run a command, and why. It stands
behind the command, or in a line of its own; then it holds up to the next comment or empty line.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LACKING = (
    "needs the network",
    "needs Google Cloud",
    "needs Docker",
    "needs SLURM",
    "needs two hosts",
    "needs a bucket",
    "needs libtpu",
    "takes minutes",
    "needs a kit",
)
# Of a line that needs these, the part that is a command of ours is run all the same.
ELSEWHERE = LACKING[:4]  # not two hosts: the command would wait for the other one
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# (add to )?(\w+\.py)\n")
_INSIDE = re.compile(r"""(?:eval "\$|source <)\((.*?)\)""")  # what a shell runs to read its own output


@dataclass(frozen=True)
class Block:
    """A block of a page; ``file`` is the one that it is, or is a further part of."""

    page: Path
    line: int
    language: str
    code: str

    @property
    def file(self) -> str:
        """The name in its first line; empty where it has none."""
        found = _FILE.match(self.code) if self.language == "python" else None
        return found[2] if found else ""

    @property
    def adds(self) -> bool:
        """Whether it is a further part of its file."""
        return self.code.startswith("# add to ")

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A program with its arguments, what it finds in its environment, and what it lacks here."""

    words: tuple[str, ...]
    environment: tuple[tuple[str, str], ...] = ()
    lacks: str = ""

    @property
    def ours(self) -> tuple[str, ...]:
        """What follows the name of our program; empty for other programs."""
        if self.words[:3] == ("python", "-m", "vl_jax"):
            return self.words[3:]
        return self.words[1:] if self.words[:1] == ("vl_jax",) else ()


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found[1], found[2])
        for found in _BLOCK.finditer(text)
    ]


def commands(block: Block) -> Iterator[Command]:
    """The commands of a shell block, one for each part of a line that ``&&`` joins."""
    above = ""
    for line in block.code.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            above = _lacking(line)
            continue
        lacks = _lacking(line) or above
        inside = _INSIDE.match(line)
        words = shlex.split(inside[1] if inside else line, comments=True)
        while words:
            stop = words.index("&&") if "&&" in words else len(words)
            yield _command(words[:stop], lacks)
            words = words[stop + 1 :]


def _lacking(comment: str) -> str:
    return next((lacking for lacking in LACKING if comment.rstrip().endswith(lacking)), "")


def _command(words: list[str], lacks: str) -> Command:
    """Words such as ``A=b`` in front are the environment."""
    first = next((i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)), len(words))
    pairs = [word.partition("=") for word in words[:first]]
    return Command(tuple(words[first:]), tuple((name, value) for name, _, value in pairs), lacks)
