"""The command line of `mpo`."""

from mpo_jax.runtime.interrupts import STOPS


def main() -> None:
    """Entry point of `mpo`, with signals handled before anything else is imported."""
    STOPS.watch()
    from mpo_jax.cli import app

    app.main()
