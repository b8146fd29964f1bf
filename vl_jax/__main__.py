"""``python -m vl_jax COMMAND`` is the console script ``vl_jax``."""

from __future__ import annotations

import sys

from vl_jax.runtime import allocator

if __name__ == "__main__":
    allocator.start_anew()
    from vl_jax.cli import main

    sys.exit(main())
