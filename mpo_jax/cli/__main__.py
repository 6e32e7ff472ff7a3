"""`python -m mpo_jax.cli`: the same as `mpo`."""

from mpo_jax.cli import main

main()
