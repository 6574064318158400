"""The command line ``dia2-jax``: speak, stream, encode, decode, prepare voices, convert.

Modules here import click and what is light; JAX and the model are imported by a command when it
runs, so that ``--help`` and mistakes in the arguments answer at once.
"""

from __future__ import annotations

from dia2_jax.cli.program import main as main
