"""What the hosts of a run have to agree on before its first step: configuration, data, folder.

Each raises the same line on every host; it names the host that differs, and how.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vl_jax.data.sample import Source
from vl_jax.data.stream.identity import identity
from vl_jax.runtime import lock
from vl_jax.runtime.hosts import log
from vl_jax.runtime.hosts.joined import COMPARING, Hosts
from vl_jax.train import resume
from vl_jax.train.loop import LOGS

_OF_A_HOST = ("data.root", "data.loading.num_threads", "data.loading.num_workers", "data.loading.cache_mb")
_LATE = 90.0  # seconds that a shared folder may show an old state of itself


def on_configuration(hosts: Hosts, workdir: Path, config: Mapping[str, Any]) -> None:
    """Compares everything that is no matter of a single host.

    Raises:
      ValueError: a host has another value.
    """
    facts = {f"config.{path}": value for path, value in resume.flat(config).items() if path not in _OF_A_HOST}
    hosts.same(f"configuration of {workdir}", facts, "start the same command on every host")


def on_data(hosts: Hosts, workdir: Path, sources: Mapping[str, Source]) -> None:
    """Compares how many records each source has, and some of them.

    Raises:
      ValueError: a host reads something else.
    """
    facts = {f"data {name}": identity(source) for name, source in sources.items()}
    hosts.same(f"data of {workdir}", facts, "give every host the same files (config.data.root)")


def on_folder(hosts: Hosts, workdir: Path) -> None:
    """Makes sure that every host sees the folder whose lock the first one holds, and begins their logs there.

    Raises:
      ValueError: a host does not.
    """
    path = workdir / lock.LOCK_FILE
    mine = path.read_text() if hosts.number == 0 else ""
    holder = hosts.gather(f"holder of {workdir}", mine, within=COMPARING)[0]
    until = time.monotonic() + _LATE
    while not (sees := path.is_file() and path.read_text() == holder) and time.monotonic() < until:
        time.sleep(0.2)
    seen = hosts.gather(f"sight of {workdir}", json.dumps(sees), within=COMPARING)
    blind = [name for name, text in zip(hosts.names, seen, strict=True) if not json.loads(text)]
    if blind:
        raise ValueError(
            f"--workdir={workdir}: {', '.join(blind[:8])} sees another folder than {hosts.names[0]}; give "
            "one that all hosts share"
        )
    log.begin(workdir / LOGS, hosts.number)
