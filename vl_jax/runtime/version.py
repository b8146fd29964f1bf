"""Which source a run is of."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit of the package's checkout, with a + if files of it were changed; empty outside of one."""

    def git(*arguments: str) -> str | None:
        try:
            found = subprocess.run(
                ["git", "-C", str(_PACKAGE), *arguments],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):  # no git, or no checkout
            return None
        return found.stdout.strip()

    name = git("rev-parse", "--short=12", "HEAD")
    if name is None or git("ls-files", "--error-unmatch", "__init__.py") is None:
        return ""
    return name + ("+" if git("status", "--porcelain", "--untracked-files=no", ".") else "")


def digest() -> str:
    """A few characters that differ where files of the package do."""
    found = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        found.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]
