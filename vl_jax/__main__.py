"""``python -m vl_jax COMMAND`` is the console script ``vl_jax``."""

from __future__ import annotations

import sys

from vl_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
