"""What the environment says of the processes of a job: how many, which one this is, and where the first is.

It is read from TPU pods (GKE's variables, or the metadata of a TPU VM), from a step of SLURM, and from
``JAX_COORDINATOR_ADDRESS``, ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID`` (of which an indexed Kubernetes job
may leave out the last). No user has to set anything where the environment says it.
"""

from __future__ import annotations

import dataclasses
import os
import re
import urllib.request
from collections.abc import Callable, Mapping

ADDRESS, COUNT, NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_PORT = "8482"  # of the first process, unless JAX_COORDINATOR_PORT says another
_INDEX = "JOB_COMPLETION_INDEX"  # of a pod, which Kubernetes sets in indexed jobs
_METADATA_SECONDS = 10.0

Metadata = Callable[[str], str | None]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a job."""

    address: str  # HOST:PORT of the first one
    count: int
    number: int  # of this one, from 0
    source: str  # what said so
    names: tuple[str, ...] = ()  # hosts of the processes, where they are known before they have come
    devices: tuple[int, ...] | None = None  # those of this host that are this process's; None: all

    def __post_init__(self):
        host, colon, port = self.address.rpartition(":")
        if not (host and colon and port.isdigit()):
            raise ValueError(f"coordinator={self.address!r}: must be HOST:PORT ({self.source})")
        if not 0 <= self.number < self.count:
            raise ValueError(f"process={self.number} of {self.count}: must be 0..{self.count - 1}")

    def who(self, number: int, hosts: Mapping[int, str] | None = None) -> str:
        """A process as messages name it, with its host where that is known."""
        known = dict(enumerate(self.names)) | dict(hosts or {})
        return f"process {number} (host {known[number]})" if number in known else f"process {number}"


def find(environment: Mapping[str, str], metadata: Metadata | None = None) -> Cluster | None:
    """The job that this process belongs to, of one process or more; None where nothing says so.

    Args:
      environment: the variables.
      metadata: gives an attribute of a TPU VM by its name, None where there is none; None: no TPU VM.

    Raises:
      ValueError: what it says is not whole, or contradicts itself.
    """
    found = _of_tpu(environment, metadata) or _of_slurm(environment)
    return _as_told(environment, found) if environment.get(ADDRESS) else found


def tpu_metadata() -> Metadata | None:
    """Reads the attributes of this TPU VM; None on any other machine. jax has to be imported before."""
    if os.environ.get("TPU_SKIP_MDS_QUERY") is not None:  # jax sets it where there is no TPU
        return None
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")

    def read(name: str) -> str | None:
        url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        try:
            with urllib.request.urlopen(request, timeout=_METADATA_SECONDS) as answer:
                return answer.read().decode()
        except OSError:
            return None

    return read


def _as_told(environment: Mapping[str, str], found: Cluster | None) -> Cluster:
    """What the three variables say; what they leave out, the scheduler may have said."""
    count, number = environment.get(COUNT), environment.get(NUMBER) or environment.get(_INDEX)
    if found is not None:
        count, number = count or str(found.count), number or str(found.number)
    for name, value in ((COUNT, count), (NUMBER, number)):
        if value is None:
            raise ValueError(f"{ADDRESS}={environment[ADDRESS]} needs {name} beside it")
        if not value.isdigit():
            raise ValueError(f"{name}={value}: must be a whole number")
    devices = found.devices if found is not None else None
    return Cluster(environment[ADDRESS], int(count or 1), int(number or 0), ADDRESS, devices=devices)


def _of_tpu(environment: Mapping[str, str], metadata: Metadata | None) -> Cluster | None:
    """A slice of TPUs, or several: GKE sets variables, a TPU VM has metadata."""
    said = dict(environment)
    workers = said.get("TPU_PROCESS_ADDRESSES") or said.get("TPU_WORKER_HOSTNAMES")
    worker, source = said.get("TPU_WORKER_ID"), "TPU_WORKER_HOSTNAMES"
    if not (workers and worker) and metadata is not None:
        ends = metadata("worker-network-endpoints")
        workers = ends and ",".join(end.split(":")[-1] for end in ends.split(","))  # name:id:ip, or a name
        worker, source = metadata("agent-worker-number"), "the metadata of this TPU VM"
        lines = [line.partition(":") for line in (metadata("tpu-env") or "").splitlines()]
        said = {key.strip(): value.strip().strip("'") for key, _, value in lines} | said
    if not (workers and worker):
        return None
    hosts = [host.split(":")[0].strip() for host in workers.split(",")]
    slices, index = int(said.get("MEGASCALE_NUM_SLICES") or 1), int(said.get("MEGASCALE_SLICE_ID") or 0)
    first = (said.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    return Cluster(
        f"{first}:{environment.get('JAX_COORDINATOR_PORT', _PORT)}",
        count=len(hosts) * slices,
        number=int(worker) + index * len(hosts),
        source=source,
        names=tuple(hosts) if slices == 1 else (),
    )


def _of_slurm(environment: Mapping[str, str]) -> Cluster | None:
    """The tasks of a step of SLURM. A task that has a node for itself has all devices of it."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    count = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS")
    if count is None or any(name not in environment for name in needed):
        return None
    hosts = nodes(environment["SLURM_STEP_NODELIST"])
    # A port of the last 4,096, which follows from the job: two jobs on a node seldom have the same.
    port = environment.get("JAX_COORDINATOR_PORT") or str(
        65536 - 4096 + int(environment["SLURM_JOB_ID"]) % 4096
    )
    alone = len(hosts) == int(count) or environment.get("SLURM_STEP_TASKS_PER_NODE", "").split("(")[0] == "1"
    return Cluster(
        f"{hosts[0]}:{port}",
        count=int(count),
        number=int(environment["SLURM_PROCID"]),
        source="SLURM",
        names=tuple(hosts) if len(hosts) == int(count) else (),
        devices=None if alone else (int(environment["SLURM_LOCALID"]),),
    )


def nodes(text: str) -> list[str]:
    """The nodes of a list as SLURM writes it: ``a[1,07-09],b`` is a1, a07, a08, a09, b."""
    found: list[str] = []
    for word in re.findall(r"[^,\[]+(?:\[[^\]]*\])?[^,\[]*", text):
        name, bracket, rest = word.partition("[")
        if not bracket:
            found.append(name)
            continue
        inside, _, tail = rest.partition("]")
        for part in inside.split(","):
            first, dash, last = part.partition("-")
            numbers = range(int(first), int(last) + 1) if dash else [int(first)]
            found += [f"{name}{n:0{len(first)}d}{tail}" for n in numbers]
    return found
