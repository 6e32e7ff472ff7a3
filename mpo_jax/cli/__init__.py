"""The command line of `mpo`."""

from mpo_jax.cli.app import main

__all__ = ["main"]
