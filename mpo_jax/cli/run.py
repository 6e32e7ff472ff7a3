"""`mpo run`."""

from typing import TYPE_CHECKING

from mpo_jax.cli.arguments import BaseModel, ConfigPath, DataPaths, Out, Overrides, read_run, short_keys
from mpo_jax.cli.starting import print_tensorboard, starting
from mpo_jax.runtime.console import console
from mpo_jax.runtime.words import counted

if TYPE_CHECKING:
    from mpo_jax.tools.report.results import RunResult

SAMPLES = 2
"""Prompts whose responses are shown."""


def run(
    config: ConfigPath = None,
    overrides: Overrides = None,
    model: BaseModel = None,
    data: DataPaths = None,
    out: Out = None,
) -> None:
    """Run the whole method for every name in `experiment`, then print the table and write the report."""
    path, resolved = read_run("run", config, [*(overrides or ()), *short_keys(model, data, out)])
    with starting("run", path, resolved):
        from mpo_jax.tools import runs
        from mpo_jax.tools.report import terminal
        from mpo_jax.tools.report.results import main_rows

    runs.start(resolved)
    finished = runs.run_experiments(resolved)
    if finished is None:
        return
    by_seed = {resolved.seed: finished.results}
    console.print(terminal.runs_table(main_rows(finished.results), "Held-out prompts: mean ± standard error"))
    terminal.print_categories(by_seed)
    _print_samples(finished.results)
    terminal.print_cautions(by_seed)
    made, reused = finished.num_made, finished.num_reused
    console.print(
        f"{counted(made, 'stage')} made, {reused} reused in {finished.seconds:.0f} s"
        + ("" if made else ": everything was there already, nothing was computed")
    )
    console.print(f"report: {finished.page}", soft_wrap=True)
    print_tensorboard(resolved)


def _print_samples(results: "list[RunResult]") -> None:
    """The first prompts' responses side by side."""
    from rich.markup import escape

    samples = {result.name: result.samples() for result in results}
    for row in range(min(SAMPLES, *(len(rows) for rows in samples.values()))):
        prompt = next(iter(samples.values()))[row]["prompt"].strip()
        shown = prompt if len(prompt) < 600 else "..." + prompt[-600:]
        console.print(f"\n[bold]prompt[/bold] {escape(shown)}", soft_wrap=True)
        for name, rows in samples.items():
            values = f"reward {rows[row]['score']:.2f}"
            if "utility" in rows[row]:
                values += f", true utility {rows[row]['utility']:.2f}"
            console.print(f"[bold]{name}[/bold] ({values}):{escape(rows[row]['response'])}", soft_wrap=True)
    console.print()
