"""The command line: every command by name, and the entry point."""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mpo_jax.cli import exits, stages
from mpo_jax.cli.accuracy import accuracy
from mpo_jax.cli.bench import bench
from mpo_jax.cli.config import show_config
from mpo_jax.cli.data import show_data
from mpo_jax.cli.doctor import doctor
from mpo_jax.cli.export import export
from mpo_jax.cli.generate import generate
from mpo_jax.cli.human import human
from mpo_jax.cli.judge import judge
from mpo_jax.cli.plan import plan
from mpo_jax.cli.report import report
from mpo_jax.cli.run import run
from mpo_jax.cli.score import score
from mpo_jax.cli.table import table
from mpo_jax.cli.verify import verify
from mpo_jax.cli.version import version
from mpo_jax.credentials import hide
from mpo_jax.errors import GOES_ON
from mpo_jax.runtime.interrupts import STOPS


class Commands(TyperGroup):
    """The commands by name. Errors of usage quote what stands in a wrong place, without credentials."""

    def make_context(self, *args: Any, **options: Any) -> Any:
        with _hiding():
            return super().make_context(*args, **options)

    def invoke(self, *args: Any, **options: Any) -> Any:
        with _hiding():
            return super().invoke(*args, **options)


@contextlib.contextmanager
def _hiding() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        # Click's, which some versions of Typer bring with them
        if isinstance(message := getattr(error, "message", None), str):
            error.message = hide(message)  # pyright: ignore[reportAttributeAccessIssue]
        raise


app = typer.Typer(
    cls=Commands,
    help="Mixed Preference Optimization in JAX. Add --debug to any command for the traceback of an error.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},  # of every command
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def options(
    _: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before a command."""


# in the order of `mpo --help`
app.command("run")(run)
app.command("config")(show_config)
stages.register(app)
app.command("table")(table)
app.command("report")(report)
app.command("data")(show_data)
app.command("generate")(generate)
app.command("score")(score)
app.command("accuracy")(accuracy)
app.command("judge")(judge)
app.add_typer(human, name="human")
app.command("export")(export)
app.command("verify")(verify)
app.command("plan")(plan)
app.command("doctor")(doctor)
app.command("bench")(bench)
app.command("version")(version)


def main() -> None:
    """Runs the command of sys.argv. Exit status: 0 success, 1 an error of ours, 2 a mistake of the user's, 3 a plan
    that does not fit, 130 after SIGINT, 143 after SIGTERM.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not debug:
        exits.hide_leftovers()
    logging.setLogRecordFactory(exits.LogRecord)
    with exits.reported(debug=debug), _leaving(arguments):
        app(args=arguments, standalone_mode=True)


def _leaving(arguments: list[str]) -> contextlib.AbstractContextManager[None]:
    """What a stop between stages leaves, of commands that make any."""
    if not {"run", "table", *stages.STAGES} & set(arguments[:1]):
        return contextlib.nullcontext()
    STOPS.workdir = None

    def finished() -> str:
        where = "" if STOPS.workdir is None else f" in {STOPS.workdir}"
        return f"{GOES_ON} the stages that are finished{where}"

    return STOPS.leaving("", finished)
