"""Test environment: eight CPU devices, strict dtypes, shapes checked at every call."""

from __future__ import annotations

import itertools
import os
import signal
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# All of this has to stand before jax is imported, or it has no effect.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
XLA_FLAGS = {
    "--xla_force_host_platform_device_count": "8",
    # Quick compilation rather than fast code, for most of a small test is compilation.
    "--xla_backend_optimization_level": "0",
    # Every worker has a core of its own: there is nothing to gain by cutting a program up to compile it.
    "--xla_cpu_parallel_codegen_split_count": "1",
    # Where few cores have other work, the slowest of eight devices comes to a meeting late. After 40 seconds
    # XLA would end the process, and every test that is left with it.
    "--xla_cpu_collective_call_terminate_timeout_seconds": "900",
    "--xla_cpu_collective_timeout_seconds": "900",
}
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11) and find_spec("libtpu") is None:
    # The older emitters compile in half of the time. Later versions have only the newer ones, and end the
    # process at a flag they do not know; so does libtpu.
    XLA_FLAGS["--xla_cpu_use_fusion_emitters"] = "false"
for flag, value in XLA_FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from hypothesis import settings  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

pytest_plugins = ["parity"]  # prints the table of test_parity.py

ROOT = Path(__file__).resolve().parent.parent

jax.config.update("jax_numpy_dtype_promotion", "strict")
# The folder is per user, and outlives the run.
CACHE = Path(tempfile.gettempdir()) / f"vl_jax_test_cache_{os.getuid()}"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

# How long an example takes depends on the machine, and on what else it does.
settings.register_profile("vl_jax", deadline=None)
settings.load_profile("vl_jax")

# grain reads absl flags when its worker processes start, and refuses if nobody parsed them.
flags.FLAGS.mark_as_parsed()

# From here on every annotated function of the package checks its arguments.
install_import_hook("vl_jax", "shapes.check")

from vl_jax.runtime import start  # noqa: E402

start.give_threads()  # to the eight devices


def pytest_configure(config: pytest.Config) -> None:
    """A test file that is named on the command line runs whole, its slow tests too."""
    arguments = config.invocation_params.args
    if any(".py" in str(a) for a in arguments) and not any(str(a).startswith("-m") for a in arguments):
        config.option.markexpr = "not gpu and not tpu_aot"


# Under nohup a hang-up would be ignored, here and in the processes that tests start.
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Every compiled program keeps some regions of memory mapped, and a process may have 65,530 of them on Linux;
# with more, XLA dies of a segmentation fault.
MOST_REGIONS, EVERY = 20_000, 5
_finished = itertools.count(1)


def pytest_runtest_teardown() -> None:
    """Lets go of the compiled programs when there are many; those still needed come back from the disk."""
    regions = Path("/proc/self/maps")
    if next(_finished) % EVERY or not regions.is_file():
        return
    with regions.open("rb") as lines:
        if sum(1 for _ in lines) > MOST_REGIONS:
            jax.clear_caches()


# Files that take longest; the workers begin with them, lest one is left with a long file at the end.
LONGEST = (
    "test_resume",
    "test_generation",
    "test_model",
    "test_step",
    "test_interventions",
    "test_conformance",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders the files, and leaves the order within them."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


def _folder(variable: str, default: Path) -> Path:
    path = Path(os.environ.get(variable, default))
    if not path.is_dir():
        pytest.skip(f"{variable}: no folder {path}")
    return path


@pytest.fixture(scope="session")
def oracles() -> Path:
    """Folder of recorded results of the reference implementation; the test is skipped without it."""
    return _folder("VL_JAX_ORACLES", ROOT.parent / "shared" / "oracle")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images, captions and questions; the test is skipped without it."""
    return _folder("VL_JAX_SHARED_DATA", ROOT.parent / "shared" / "data")
