"""The paper's runs for several seeds, and from them its tables, figures and claims."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mpo_jax.config.load import to_yaml
from mpo_jax.config.schema import Config
from mpo_jax.errors import NothingSelected
from mpo_jax.pipeline import preflight
from mpo_jax.pipeline.bucket import Bucket
from mpo_jax.pipeline.experiments import table_variants
from mpo_jax.pipeline.keeping import ModelStore
from mpo_jax.pipeline.pipeline import Pipeline
from mpo_jax.pipeline.table import estimates, seed_config, table_stages
from mpo_jax.runtime.files import write_text
from mpo_jax.runtime.outputs import check_output_folder
from mpo_jax.runtime.processes import REPORTED, is_main, wait
from mpo_jax.runtime.progress import Overall
from mpo_jax.tools.report import results
from mpo_jax.tools.report.place import check_place
from mpo_jax.tools.report.provenance import TABLE_CONFIG
from mpo_jax.tools.report.seeds import BySeed
from mpo_jax.tools.report.verdict_rows import find_verdicts
from mpo_jax.training import wandb_log

if TYPE_CHECKING:
    from mpo_jax.tools.report.evidence import Evidence

FOLDERS = ("tables", "figures")


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a table is made of.

    Attributes:
      claims: the claims and whether the runs support them, as text.
      page: the report.
      folders: where tables and figures are.
    """

    by_seed: BySeed
    evidence: "Evidence"
    claims: str
    page: Path
    folders: list[Path]


class SeedTable:
    """Makes what is missing, seed by seed in `<workdir>/seed-N`, then tables, figures and the report.

    A run whose split leaves nothing to train on is left out and named; everything else that fails ends the process,
    and a new table of the same configuration goes on from there.
    """

    def __init__(self, config: Config):
        self._config, self._workdir = config, Path(config.workdir)
        check_place(self._workdir)
        # what would be found when all stages are made
        for name in FOLDERS:
            check_output_folder("workdir", self._workdir / name)
        for seed in config.table.seeds:
            check_output_folder("workdir", self._workdir / f"seed-{seed}")
        find_verdicts(self._workdir)
        self.names = [variant.name for variant in table_variants(config.table, config.select)]
        inputs_checked = preflight.check_fresh(config)
        self.stages = table_stages(config)
        missing = [stage.recipe for stage in self.stages if not stage.is_there]
        preflight.check_stages(config, missing, inputs_checked=inputs_checked)
        wait(preflight.CHECKED)
        self.overall = Overall(estimates(config, self.stages))
        self._left_out: dict[str, str] = {}
        self._stores: list[ModelStore] = []

    @property
    def seed_list(self) -> str:
        return ", ".join(map(str, self._config.table.seeds))

    def begin(self) -> None:
        """Records the table's configuration in the workdir."""
        if is_main():
            self._workdir.mkdir(parents=True, exist_ok=True)
            write_text(self._workdir / TABLE_CONFIG, [to_yaml(self._config)])

    def make(self, seed: int, *, left_out: Callable[[str, str], None] = lambda name, reason: None) -> ModelStore:
        """All runs of one seed; the store says which stages were made.

        Args:
          left_out: called with the name of each run that is left out, and the reason.
        """
        config = seed_config(self._config, seed)
        store = ModelStore(config, self.overall)
        pipeline = Pipeline(config, store)
        seeds = self._config.table.seeds
        later = {*seeds[seeds.index(seed) + 1 :]}
        store.request(pipeline, self.names, [stage.name for stage in self.stages if later & {*stage.seeds}])
        for name in self.names:
            try:
                pipeline.record(pipeline.experiment(name))
            except NothingSelected as nothing:
                self._left_out[f"{name}, seed {seed}"] = str(nothing)
                left_out(name, str(nothing))
                own = {s.name for s in self.stages if s.seed == seed and s.runs == [name]}
                self.overall.leave_out(own)
        store.finish()
        self._stores.append(store)
        if not later:
            for one in self._stores:
                one.release()
        return store

    def finish(self) -> Finished | None:
        """Writes tables, figures, claims and the report; None except in process 0."""
        if not is_main():
            # a process that ends waits for the others only as long as for a heartbeat
            wait(REPORTED)
            return None
        # as for a run's report
        from mpo_jax.tools.report.page import write_table_report

        config, workdir = self._config, self._workdir
        names = tuple(self.names)
        by_seed = {seed: results.collect(workdir / f"seed-{seed}", names) for seed in config.table.seeds}
        page, evidence, claims = write_table_report(
            workdir, by_seed, resamples=config.evaluate.bootstrap_resamples, left_out=self._left_out
        )
        if (bucket := Bucket.of(config)) is not None:
            bucket.send_results(workdir)
        wandb_log.log_report(config, workdir)
        wait(REPORTED)
        return Finished(by_seed, evidence, claims, page, [workdir / name for name in FOLDERS])
