"""Where the recorded cases of the reference processor are."""

from __future__ import annotations

from pathlib import Path

import pytest


def processor_folder(oracles: Path) -> Path:
    """The folder of the processor's cases; the test is skipped where the oracle has none."""
    folder = oracles / "deepseek_vl2" / "processor"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    return folder
