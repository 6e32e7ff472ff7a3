"""placeholder"""
from pathlib import Path
from mpo_jax.report.results import collect, main_rows, write_csv
def write_report(workdir: Path, *, resamples: int) -> Path:
    write_csv(workdir/"report"/"tables"/"main.csv", main_rows(collect(workdir)))
    return workdir/"report"/"index.html"
