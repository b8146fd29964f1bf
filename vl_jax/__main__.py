"""``python -m vl_jax COMMAND`` is the console script ``vl_jax``."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from vl_jax.runtime import allocator

        allocator.start_anew()
        from vl_jax.cli import run

        run()
    except KeyboardInterrupt:  # while everything is imported
        sys.exit(130)
