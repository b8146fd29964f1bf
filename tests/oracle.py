"""Where recorded cases are."""

from __future__ import annotations

from pathlib import Path

import pytest


def folder_in(oracles: Path, *names: str) -> Path:
    """A folder of recorded cases; the test is skipped where the oracle has none."""
    folder = oracles.joinpath(*names)
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    return folder


def processor_folder(oracles: Path) -> Path:
    """That of the reference processor."""
    return folder_in(oracles, "deepseek_vl2", "processor")
