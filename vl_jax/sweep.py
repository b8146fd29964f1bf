"""Many runs of one experiment that differ in some values, each in a folder named after its differences.

    sweep_top_k() in the experiment file --> [{"model.moe.top_k": 1}, ...] --> WORKDIR/top_k=1/, ...

Every configuration is checked before the first run begins. A finished run is not repeated and an unfinished
one resumes, so the same command continues a sweep that was stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from vl_jax import config, runs
from vl_jax.report import comparison
from vl_jax.schema import ConfigError

logger = logging.getLogger(__name__)


def run(spec: str, names: Sequence[str], workdir: Path, overrides: Iterable[tuple[str, str]] = ()) -> Path:
    """Trains every variant that has not finished yet and compares all of them; returns the page's path.

    Args:
      spec: experiment file, as for ``config.load``.
      names: of its sweeps, whose product is run.
      overrides: what all runs share.

    Raises:
      ConfigError: a configuration is wrong; nothing has run then.
      ValueError: some runs failed; the others are there, and compared.
    """
    variants = config.sweep(spec, names)
    folders = [workdir / folder_name(variant) for variant in variants]
    twice = next((f.name for f in folders if folders.count(f) > 1), None)
    if twice is not None:
        raise ConfigError(f"--sweep={','.join(names)}: two variants are called {twice!r}")
    shared = tuple(overrides)
    experiments = [config.load(spec, (*variant.items(), *shared)) for variant in variants]
    failed = []
    for number, (folder, chosen) in enumerate(zip(folders, experiments, strict=True), start=1):
        if (folder / "run.json").is_file():
            logger.info("run %d of %d: %s is finished", number, len(folders), folder.name)
            continue
        logger.info("run %d of %d: %s", number, len(folders), folder.name)
        try:
            runs.run(chosen, folder)
        except ValueError as error:
            logger.error("%s: %s", folder.name, error)
            failed.append(folder.name)
    page = comparison.write_comparison(workdir)
    if failed:
        raise ValueError(f"{len(failed)} of {len(folders)} runs failed: {', '.join(failed)}; see {page}")
    return page


def folder_name(variant: Mapping[str, str]) -> str:
    """``top_k=2,scheme=switch``: the last part of every path, and its value; ``base`` without any.

    Whatever is no good in the name of a file becomes a dash.
    """
    pairs = (f"{path.rpartition('.')[2]}={value}" for path, value in variant.items())
    text = "".join(c if c.isalnum() or c in "=,._+-" else "-" for c in ",".join(pairs))
    return text.strip("-.") or "base"
