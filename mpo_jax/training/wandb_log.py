"""Weights & Biases, if `runtime.wandb` is set: a run for each stage that trains, and one for the report.

It uploads the resolved configuration, the numbers of metrics.jsonl, and the report with its samples. It does not upload
code, git state, installed packages, command line, host name, system metrics or terminal output. The package itself
reads the key, from the environment or the netrc file of `wandb login`.

A failure is a warning and never ends a stage. A server that does not answer is tried once: later runs of this process
stay on disk, for `wandb sync`.
"""

import contextlib
import csv
import dataclasses
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.markup import escape

from mpo_jax.config.schema import Config, WandbConfig
from mpo_jax.credentials import hide
from mpo_jax.errors import UserError
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_text
from mpo_jax.runtime.processes import is_main

INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 60.0
"""How long the end of a run waits for its uploads; the rest stays on disk."""
ID_FILE = "wandb_id"
"""In a stage's folder: the id of its W&B run, so that a resumed stage, perhaps on another machine, resumes that run."""
REPORTED = ("report", "tables", "figures")
"""The folders of a workdir that the report's artifact contains."""


@dataclasses.dataclass
class _Session:
    """The state of this process, so that it neither waits nor warns twice."""

    unreachable: bool = False
    warned: set[str] = dataclasses.field(default_factory=set)

    def warn(self, message: str) -> None:
        message = hide(message)  # the server's address may have a user in it
        if message not in self.warned:
            self.warned.add(message)
            console.print(message, style="yellow", markup=False, soft_wrap=True)


_session = _Session()


def check(settings: WandbConfig | None) -> str | None:
    """Checks what can be checked without the network, and returns the mode; None if W&B is off.

    Raises:
      UserError: if the package is not installed, or the mode is online and there are no credentials.
    """
    mode = _mode(settings)
    if mode is None:
        return None
    try:
        # a name inside the package: importing the folder ./wandb, which W&B makes, would succeed too
        from wandb import init  # noqa: F401
    except ImportError as error:
        raise UserError(
            "runtime.wandb is set and the package wandb is not installed: bash launch/setup.sh wandb, or set "
            "runtime.wandb=null"
        ) from error
    if mode == "online" and not _has_credentials():
        raise UserError(
            f"runtime.wandb: no credentials for {server()}. Set WANDB_API_KEY or run `wandb login`; "
            "runtime.wandb.mode=offline keeps the runs on disk, for `wandb sync` later"
        )
    return mode


class WandbRun:
    """One run. Nothing here raises: a failure is reported once and ends the run's logging.

    Args:
      folder: where W&B makes its folder `wandb`, with a copy of everything that a run sends.
      run_id: an existing run with this id is resumed.
      config: shown beside the run.
    """

    def __init__(
        self,
        settings: WandbConfig,
        folder: Path,
        *,
        run_id: str,
        name: str,
        group: str,
        job_type: str,
        config: Mapping[str, Any],
    ):
        self._run: Any = None
        with self._guarded("start"):
            mode = check(settings)
            self._run = None if mode is None else _start(
                mode, project=settings.project, entity=settings.entity, dir=str(folder), id=run_id, name=name,
                group=group, job_type=job_type, config=dict(config),
            )  # fmt: skip
        if self._run is not None:
            offline = f"{Path(self._run.dir).parent} (upload it with `wandb sync`)"
            place = offline if self._run.offline else self._run.url
            console.print(f"[dim]  W&B: {escape(hide(str(place)))}[/dim]", soft_wrap=True)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of one step under their own names.

        The step is a metric of its own and the axis of all others: W&B's own counter never goes back, while the steps
        of a stage that resumes from a checkpoint do.
        """
        if self._run is not None:
            with self._guarded("log"):
                self._run.log({"step": step, **values})

    def log_report(self, workdir: Path, name: str) -> None:
        """The workdir's report, tables and figures as an artifact; the main table's numbers as the run's summary."""
        if self._run is None:
            return
        with self._guarded("log the report"):
            import wandb

            artifact = wandb.Artifact(name, type="report")
            for folder in REPORTED:
                for path in sorted((workdir / folder).rglob("*")):
                    if path.is_file():
                        artifact.add_file(str(path), name=path.relative_to(workdir).as_posix())
            self._run.summary.update(_main_numbers(workdir / "report" / "tables" / "main.csv"))
            self._run.log_artifact(artifact)

    def close(self, *, failed: bool = False) -> None:
        """Ends the run once the rest is uploaded, or after FINISH_TIMEOUT_S."""
        run, self._run = self._run, None
        if run is not None:
            with self._guarded("end"):
                run.finish(exit_code=int(failed))

    @contextlib.contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the package raises errors of many libraries
            self._run = None
            # an upload that timed out: the next run would wait as long
            _session.unreachable |= isinstance(error, TimeoutError)
            # its text could quote uploaded data
            message = str(error) if isinstance(error, UserError) else type(error).__name__
            _session.warn(
                f"W&B could not {what} a run: {message}. The command goes on; what W&B has of the run is in the "
                "workdir's folder wandb"
            )


def stage_run(config: Config, folder: Path, stage: str, name: str) -> WandbRun | None:
    """The run of the stage that is made in `folder`, for a tracker; None where W&B is off, and in other processes.

    Args:
      name: the artifact's.
    """
    settings = config.runtime.wandb
    if settings is None or _mode(settings) is None or not is_main():
        return None
    workdir = Path(config.workdir)
    return WandbRun(
        settings, workdir, run_id=_run_id(folder / ID_FILE), name=name, group=_group(workdir, config.seed),
        job_type=stage, config=config.model_dump(mode="json"),
    )  # fmt: skip


def log_report(config: Config, workdir: Path) -> None:
    """Logs the report and a table's folders as a new version of one artifact, in the report's run."""
    settings = config.runtime.wandb
    if settings is None or _mode(settings) is None or not is_main():
        return
    group = _group(workdir, None)
    run = WandbRun(
        settings, workdir, run_id=_run_id(workdir / "wandb" / "report_id"), name=f"{group} report", group=group,
        job_type="report", config=config.model_dump(mode="json"),
    )  # fmt: skip
    run.log_report(workdir, re.sub(r"[^A-Za-z0-9_.-]", "-", f"report-{group}"))
    run.close()


def server() -> str:
    """The address of the W&B server: WANDB_BASE_URL's, that of `wandb login --host`, or the public one."""
    import wandb

    return os.environ.get("WANDB_BASE_URL") or wandb.setup().settings.base_url


def _mode(settings: WandbConfig | None) -> str | None:
    """online or offline; None if nothing is logged."""
    if settings is None:
        return None
    mode = settings.mode or os.environ.get("WANDB_MODE") or "online"
    return {"disabled": None, "offline": "offline", "dryrun": "offline"}.get(mode, "online")


def _has_credentials() -> bool:
    import requests.utils

    named = any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"))
    return named or requests.utils.get_netrc_auth(server()) is not None


def _start(mode: str, **given: Any) -> Any:
    """A started run, kept on disk if the server cannot be reached."""
    # the package would send reports of its own errors to its makers
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(
        silent=True, console="off", disable_code=True, disable_git=True, save_code=False, host="-",
        x_disable_meta=True, x_disable_machine_info=True, x_disable_stats=True, x_save_requirements=False,
        base_url=server(), init_timeout=INIT_TIMEOUT_S, finish_timeout=FINISH_TIMEOUT_S, finish_timeout_raises=True,
    )  # fmt: skip
    more = {**given, "settings": settings, "resume": "allow", "reinit": "create_new", "allow_val_change": True}
    Path(given["dir"]).mkdir(parents=True, exist_ok=True)
    if mode == "online" and not _session.unreachable:
        try:
            return _with_steps(wandb.init(mode="online", **more))
        except Exception as error:
            _session.unreachable = True
            _session.warn(
                f"W&B: {server()} cannot be used ({type(error).__name__}). Runs are kept in {given['dir']}/wandb; "
                "upload them with `wandb sync`"
            )
    if mode == "online":
        # the package's service keeps the id of a run that could not start
        more["id"] += "-offline"
    return _with_steps(wandb.init(mode="offline", **more))


def _with_steps(run: Any) -> Any:
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _run_id(file: Path) -> str:
    """The id in the file; a new one is made and written if there is none."""
    if not file.is_file():
        write_text(file, [secrets.token_hex(8)])
    return file.read_text(encoding="utf-8").strip()


def _group(workdir: Path, seed: int | None) -> str:
    """The workdir's name, or the table's if the workdir is one of its seeds."""
    whole = workdir.resolve()
    return whole.parent.name if whole.name == f"seed-{seed}" else whole.name


def _main_numbers(table: Path) -> dict[str, float]:
    """`<run>/<column>`: the numbers of the report's main table."""
    numbers = {}
    if table.is_file():
        with table.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for column, value in row.items():
                    with contextlib.suppress(ValueError):
                        numbers[f"{row['run']}/{column}"] = float(value)
    return numbers
