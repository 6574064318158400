"""``python -m dia2_jax`` is ``dia2-jax``."""

from __future__ import annotations

from dia2_jax.cli import main

if __name__ == "__main__":
    main(prog_name="dia2-jax")
