"""The command line: parse, dispatch, print. The work is in the layers below."""

import errno
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from mpo_jax import __version__
from mpo_jax.cli import judging
from mpo_jax.config import keys
from mpo_jax.config.load import load_config, to_yaml
from mpo_jax.config.schema import TRAINED, Config
from mpo_jax.errors import Preempted, UserError

FULL_DISK = "No space left on device"
"""How libraries that write in other languages than Python, and so raise no OSError, report a full disk."""

INTERRUPTED = 130
"""The status with which Typer ends a command on Ctrl-C."""

DOES_NOT_FIT = 3
"""The status of `mpo plan` where a program needs more memory than the target has."""

TERMINATED = 143
"""The status of a process that SIGTERM ends: 128 and the signal's number."""

app = typer.Typer(
    help="Mixed Preference Optimization in JAX. Add --debug to any command for the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, or more YAML files")]

ModelPath = Annotated[str, typer.Argument(metavar="MODEL", help="run, stage or model folder, .gguf file, or hub id")]


def _load(config: Path, overrides: list[str] | None) -> Config:
    return load_config(config, tuple(overrides or ()))


@app.command()
def run(config: ConfigPath, overrides: Overrides = None) -> None:
    """Run the whole method for every name in `experiment`, then print the table and write the report."""
    from mpo_jax.cli import run as command

    command.run(_load(config, overrides))


@app.command("config")
def show_config(
    config: Annotated[
        str | None, typer.Argument(metavar="CONFIG", help="YAML file; with --keys a section or key, such as ppo.kl")
    ] = None,
    overrides: Overrides = None,
    show_keys: Annotated[
        bool, typer.Option("--keys", help="list the keys of a section, or all: type, default, range, meaning")
    ] = False,
) -> None:
    """Print the resolved configuration, or with --keys what each key means."""
    if show_keys:
        if overrides:
            raise UserError(f"mpo config --keys takes one section or key, not {overrides[0]!r} after it")
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        typer.echo(keys.listing(config, width), nl=False)
    elif config is None:
        raise UserError("mpo config needs CONFIG, the YAML file to resolve; mpo config --keys lists every key")
    else:
        typer.echo(to_yaml(_load(Path(config), overrides)), nl=False)


def _stage_command(name: str, what: str) -> None:
    @app.command(name, help=f"Run the method up to {what}.")
    def command(config: ConfigPath, overrides: Overrides = None) -> None:
        from mpo_jax.cli import run

        run.run_until(_load(config, overrides), name)  # type: ignore[arg-type]


def _training_command(name: str, what: str) -> None:
    @app.command(name, help=f"Run the method up to {what}. train.KEY=VALUE stands for {name}.train.KEY=VALUE.")
    def command(
        config: ConfigPath,
        overrides: Overrides = None,
        log_every: Annotated[
            int | None, typer.Option(min=1, help="train.log_every; with 1 a line a step, where there is no terminal")
        ] = None,
    ) -> None:
        from mpo_jax.cli import run

        given = [*(overrides or ()), *([] if log_every is None else [f"train.log_every={log_every}"])]
        run.run_until(load_config(config, tuple(given), stage=name), name)  # type: ignore[arg-type]


for _name, _what in {
    "sft": "supervised fine-tuning",
    "reward": "the reward model",
    "select": "data selection",
    "dpo": "the experiment's last DPO step",
    "ppo": "the experiment's last PPO step",
    "evaluate": "evaluation, without the report",
}.items():
    (_training_command if _name in TRAINED else _stage_command)(_name, _what)


@app.command()
def table(
    config: ConfigPath,
    overrides: Overrides = None,
    seeds: Annotated[
        str | None, typer.Option(help="comma-separated seeds, each in its own folder of the workdir; as seeds=0,1,2")
    ] = None,
    dry: Annotated[
        bool, typer.Option("--dry-run", help="show the stages, what is there, and the time; make nothing")
    ] = False,
) -> None:
    """Make the paper's runs for every seed, then its tables, figures and claims over seeds, and the report.

    seeds=0,1,2 and experiment=NAME,NAME stand for table.seeds and table.experiment.
    """
    from mpo_jax.cli import table as command

    given = [*(overrides or ()), *([] if seeds is None else [f"seeds={seeds}"])]
    whole = tuple(f"table.{word}" if word.startswith(("seeds=", "experiment=")) else word for word in given)
    (command.dry_run if dry else command.table)(load_config(config, whole))


@app.command()
def report(workdir: Annotated[Path, typer.Argument(metavar="WORKDIR")]) -> None:
    """Write the report of a workdir's finished runs again."""
    from mpo_jax.cli import run as command

    command.report(workdir)


@app.command("data")
def show_data(
    config: ConfigPath,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(help="rows of each kind to show")] = 2,
) -> None:
    """Show what a configuration reads, drops and cuts, and some rows token by token, without training."""
    from mpo_jax.cli import data

    data.show(_load(config, overrides), num_examples=examples)


@app.command()
def generate(
    model: ModelPath,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="text, or - for standard input")],
    overrides: Overrides = None,
    system: Annotated[str | None, typer.Option(help="system turn of a chat")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="continue the text, without chat and template")] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="default: as in its training, else 256, or half its positions")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0)] = 1.0,
    num_samples: Annotated[int, typer.Option(min=1)] = 1,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Answer a prompt, or continue a text: in the template and chat of the model's training, where they are known."""
    from mpo_jax.cli import generate as command
    from mpo_jax.models.generate import Sampling

    if top_p == 0.0:
        raise UserError("--top-p must be above 0; --temperature 0 takes the likeliest token")
    greedy = temperature == 0.0
    sampling = Sampling(1, num_samples, 1.0 if greedy else temperature, top_p, greedy)
    given = (f"seed={seed}", *(overrides or ()))
    command.generate(
        model, prompt, system=system, raw=raw, max_new_tokens=max_new_tokens, sampling=sampling, overrides=given
    )


@app.command()
def score(
    model: ModelPath,
    data: Annotated[
        str, typer.Argument(metavar="DATA", help="rows {prompt, chosen, rejected} or {prompt, completion}")
    ],
    out: Annotated[Path, typer.Option(metavar="OUT.jsonl", help="file to write, a line for each row")],
    overrides: Overrides = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    max_rows: Annotated[int | None, typer.Option(min=1, help="the first rows only")] = None,
) -> None:
    """Log-probabilities (language model) or scores (reward model) of every row's responses."""
    from mpo_jax.cli import score as command

    command.score(model, data, out, batch_size=batch_size, max_rows=max_rows, overrides=tuple(overrides or ()))


app.command()(judging.judge)
app.add_typer(judging.human, name="human")


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="run, stage or model folder, .gguf file, hub id")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="new folder")],
    overrides: Overrides = None,
    critic: Annotated[bool, typer.Option("--critic", help="PPO's critic instead of its policy")] = False,
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option()] = "float32",
) -> None:
    """Write a model as a Hugging Face folder, which transformers loads."""
    from mpo_jax.cli import export as command

    command.export(checkpoint, folder, critic=critic, dtype=dtype, overrides=tuple(overrides or ()))


@app.command()
def verify(
    workdir: Annotated[Path, typer.Argument(metavar="WORKDIR")],
    stage: Annotated[str | None, typer.Option(help="one kind of stage (sft, ...) or one stage's folder name")] = None,
) -> None:
    """Train a stretch between stored checkpoints again and compare hashes; status 1 where they differ."""
    from mpo_jax.tools import verify as command

    if not command.verify(workdir, stage):
        raise typer.Exit(1)


@app.command()
def plan(
    config: ConfigPath,
    on: Annotated[
        str, typer.Option(metavar="TARGET", help="a100x8, 2xa100x8, h100x8, v5p:2x2x2, v5e:2x4, cpu, cpu:80, ...")
    ],
    overrides: Overrides = None,
    stage: Annotated[str, typer.Option(help="comma-separated stages (sft, reward, ...); default: all")] = "",
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="file to write the numbers to")] = None,
    fit: Annotated[
        bool, typer.Option("--fit", help="search micro-batches and remat for the fastest that fits")
    ] = False,
) -> None:
    """Compile every program for devices that need not be here; status 3 where one does not fit their memory."""
    # read when JAX is imported: the compilers would tell of every driver that is not there
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from mpo_jax.cli import plan as command

    stages = tuple(name.strip() for name in stage.split(",") if name.strip())
    if not command.plan(_load(config, overrides), on, stages=stages, json_file=json, search=fit):
        raise typer.Exit(DOES_NOT_FIT)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="YAML file whose run to check for")] = None,
    overrides: Overrides = None,
) -> None:
    """Look at devices, memory, links, libraries, disk, hub and clocks, and say how to mend what will go wrong."""
    from mpo_jax.cli import doctor as command

    if not command.doctor(load_config(config, tuple(overrides or ()))):
        raise typer.Exit(1)


@app.command("bench")
def run_bench(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORKLOAD | CONFIG.yaml | KEY=VALUE]...", help="default: all workloads"),
    ] = None,
    rows: Annotated[
        str, typer.Option(help="PROMPT+RESPONSE tokens of made-up rows, or: data, the configuration's own rows")
    ] = "128+128",
    batch: Annotated[int, typer.Option(min=1, help="rows, pairs or prompts a step")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="timed steps")] = 5,
    vocab: Annotated[int, typer.Option(min=2, help="of the model made up where model.path names none")] = 4096,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE")] = None,
    profile: Annotated[Path | None, typer.Option(metavar="DIR", help="a trace of one step of each workload")] = None,
) -> None:
    """Time the stages' own functions on this machine: tokens/s, FLOP/s, MFU, memory."""
    from mpo_jax.cli import bench as command

    given = arguments or []
    names = tuple(word for word in given if "=" not in word and not word.endswith((".yaml", ".yml")))
    overrides = tuple(word for word in given if word not in names)
    lengths: tuple[int, int] | None = None
    if rows != "data":
        prompt, _, response = rows.partition("+")
        if not (prompt.isdigit() and response.isdigit() and int(prompt) and int(response)):
            raise UserError(f"--rows wants PROMPT+RESPONSE tokens, such as 128+128, or data, not {rows!r}")
        lengths = int(prompt), int(response)
    command.bench(
        load_config(None, overrides),
        names,
        batch=batch,
        steps=steps,
        rows=lengths,
        vocab_size=vocab,
        json_file=json_file,
        profile=profile,
    )


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point of `mpo`. Exit status: 0 success, 1 an error of ours, 2 a mistake of the user's, 3 a plan that
    does not fit, 130 interrupted, 143 terminated with a checkpoint saved.
    """
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
    except Preempted as error:
        _fail(str(error), TERMINATED)
    except SystemExit as end:
        if end.code == INTERRUPTED:
            _fail("interrupted; the same command goes on from the last checkpoint", INTERRUPTED)
        raise
    except Exception as error:
        if debug:
            raise
        # not imported here: that would start JAX to report a misspelt key
        processes = sys.modules.get("mpo_jax.runtime.processes")
        if processes and processes.broke_off(error):
            _fail(
                f"a computation over all processes broke off: {str(error).splitlines()[0]}\nMost likely another "
                "process died or failed: its own output says why. The same command goes on from the last checkpoint",
                1,
            )
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
    # not imported here: that would start JAX to report a misspelt key
    processes = sys.modules.get("mpo_jax.runtime.processes")
    where = processes.name() if processes else ""
    print(f"error{where}: {message}", file=sys.stderr)
    if where:
        processes.leave(status)  # type: ignore[union-attr]
    raise SystemExit(status)
