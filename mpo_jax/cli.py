"""The command line: parse, dispatch, print. The work is in the layers below."""

import errno
import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from mpo_jax import __version__
from mpo_jax.config import Config, load_config, to_yaml
from mpo_jax.errors import UserError

FULL_DISK = "No space left on device"
"""How libraries that write in other languages than Python, and so raise no OSError, report a full disk."""

INTERRUPTED = 130
"""The status with which Typer ends a command on Ctrl-C."""

app = typer.Typer(
    help="Mixed Preference Optimization in JAX. Add --debug to any command for the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, or more YAML files")]


def _load(config: Path, overrides: list[str] | None) -> Config:
    return load_config(config, tuple(overrides or ()))


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run the whole method for every name in `experiment`, then print the table and write the report."""
    from mpo_jax import session

    session.run(_load(config, overrides))


@app.command("config")
def show_config(config: ConfigPath, overrides: Overrides = None) -> None:
    """Print the resolved configuration."""
    typer.echo(to_yaml(_load(config, overrides)), nl=False)


def _stage_command(name: str, what: str) -> None:
    @app.command(name, help=f"Run the method up to {what}.")
    def command(config: ConfigPath, overrides: Overrides = None) -> None:
        from mpo_jax import session

        session.run_until(_load(config, overrides), name)  # type: ignore[arg-type]


for _name, _what in {
    "sft": "supervised fine-tuning",
    "reward": "the reward model",
    "select": "data selection",
    "dpo": "the experiment's last DPO step",
    "ppo": "the experiment's last PPO step",
    "evaluate": "evaluation, without the report",
}.items():
    _stage_command(_name, _what)


@app.command()
def table(
    config: ConfigPath,
    overrides: Overrides = None,
    seeds: Annotated[str, typer.Option(help="comma-separated seeds, each in its own folder of the workdir")] = "0",
) -> None:
    """Run every experiment of the configuration for several seeds and print the table over seeds."""
    from mpo_jax import session

    try:
        numbers = tuple(int(seed) for seed in seeds.split(","))
    except ValueError:
        raise UserError(f"--seeds wants comma-separated whole numbers, not {seeds!r}") from None
    session.table(_load(config, overrides), numbers)


@app.command()
def report(workdir: Annotated[Path, typer.Argument(metavar="WORKDIR")]) -> None:
    """Write the report of a workdir's finished runs again."""
    from mpo_jax import session

    session.report(workdir)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point of `mpo`. Exit status: 0 success, 1 an error of ours, 2 a mistake of the user's, 130 interrupted."""
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv) - 1
    if not debug:
        # Orbax logs tracebacks of what it then raises
        logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        app(args=arguments, standalone_mode=True)
    except UserError as error:
        if debug:
            raise
        _fail(str(error), 2)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _fail("interrupted; the same command goes on from the last checkpoint", INTERRUPTED)
        raise
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) or FULL_DISK in str(error):
            _fail(_explain(error), 2)
        _fail(f"{type(error).__name__}: {error}\nThis is a fault in mpo_jax; --debug shows where.", 1)


def _explain(error: Exception) -> str:
    code = error.errno if isinstance(error, OSError) else None
    where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
    if code in (errno.ENOSPC, errno.EDQUOT) or FULL_DISK in str(error):
        return f"no space left on the disk{where}. Free some and run the same command again; nothing unfinished is used"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read{where}. Choose another folder with workdir=DIR"
    return str(error)


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(status)
