"""Model cards: the README.md of an exported model, from the manifests of the stages that made it."""

import contextlib
import dataclasses
import shlex
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape

from mpo_jax.config.load import read_record, to_yaml
from mpo_jax.config.schema import Config
from mpo_jax.errors import Damaged
from mpo_jax.models.hf.hub import is_hub_id, on_this_machine
from mpo_jax.pipeline.experiments import Variant, is_run
from mpo_jax.pipeline.recipe import MANIFEST, is_stage_folder, read_manifest, read_recipe
from mpo_jax.pipeline.run_folder import CONFIG, last_step, read_config, read_environment, stage_links
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_text
from mpo_jax.runtime.version import __version__
from mpo_jax.tools.report.markdown import markdown
from mpo_jax.tools.report.results import COLUMNS

CONFIG_FILE = "mpo_config.yaml"
"""Beside the card: the resolved configuration, which the reproduce command reads."""
ADAPTER = "PEFT adapter of a "
"""How the kind of a folder begins that holds adapters alone."""
SUBSETS = {"dpo": "pairs", "ppo": "prompts"}


@dataclasses.dataclass(frozen=True)
class Origin:
    """What made a model.

    Attributes:
      lineage: manifests of the stages from SFT to the model's own, by folder name; the last may be a recipe alone.
      config: the resolved configuration of its own stage.
      run: the run whose final policy or reward model it is; None where no run has it.
      evaluation: the summary of its evaluation, if it was evaluated.
      command: the command that the run was made by.
    """

    lineage: dict[str, dict[str, Any]]
    config: Config
    run: str | None
    evaluation: dict[str, Any] | None
    command: list[str]

    @property
    def own(self) -> dict[str, Any]:
        return next(reversed(self.lineage.values()))


def find_origin(model: Path) -> Origin | None:
    """What made the model in a stage's `model/` or `critic/`; None for a model from elsewhere."""
    stage = model.resolve().parent
    manifest = _manifest(stage)
    if manifest is None:
        return None
    lineage = {stage.name: manifest}
    parents = manifest["parents"]
    while (name := parents.get("init") or parents.get("sft")) is not None:
        if (parent := _manifest(stage.parent / name)) is None:
            break
        lineage[name], parents = parent, parent["parents"]
    lineage = dict(reversed(lineage.items()))
    run, folder = _run_of(stage)
    config = _stage_config(stage, folder)
    if config is None:
        return None
    command = read_environment(folder).get("command", []) if folder else []
    return Origin(lineage, config, run, _evaluation_of(stage), command)


def trained_config(model: Path) -> Config | None:
    """The configuration that a model was trained under; None for a model from elsewhere.

    Args:
      model: a stage's `model/` or `critic/`, or the folder of an exported model.
    """
    exported = model / CONFIG_FILE
    if exported.is_file():
        return read_record(exported)
    stage = model.resolve().parent
    return None if _manifest(stage) is None else _stage_config(stage, _run_of(stage)[1])


def _stage_config(stage: Path, run: Path | None) -> Config | None:
    """A run that used a stage has its settings; a stage that trained has them too."""
    kept = [folder / CONFIG for folder in (run, stage) if folder]
    return next((read_config(path) for path in kept if path.is_file()), None)


def _manifest(stage: Path) -> dict[str, Any] | None:
    """A stage's manifest or recipe; None for another folder, which may have files of these names too."""
    if is_stage_folder(stage):
        return read_recipe(stage)
    with contextlib.suppress(Damaged):
        return read_recipe(stage)
    return None


def _run_of(stage: Path) -> tuple[str | None, Path | None]:
    """The first run whose last step, or whose reward model, the stage is; else any run that used it, without a name."""
    used: Path | None = None
    for folder in sorted((stage.parent.parent / "runs").glob("*")):
        if not is_run(folder.name):
            continue
        try:
            roles = {role for role, linked in stage_links(folder).items() if linked == stage}
            last = last_step(folder).name
        except Damaged as damage:
            console.print(f"[yellow]{escape(str(damage))}[/yellow]", soft_wrap=True)
            continue
        if last in roles:
            return folder.name, folder
        used = used or (folder if roles else None)
    return None, used


def _evaluation_of(stage: Path) -> dict[str, Any] | None:
    for path in sorted(stage.parent.glob(f"evaluate-*/{MANIFEST}")):
        try:
            manifest = read_manifest(path.parent)
        except Damaged as damage:
            console.print(f"[yellow]{escape(str(damage))}[/yellow]", soft_wrap=True)
            continue
        if manifest["parents"].get("policy") == stage.name:
            return manifest["summary"]
    return None


def write_card(
    folder: Path, model: Path, source: str, *, name: str, kind: str, dtype: str, base: str | None = None
) -> None:
    """Writes `README.md`, and `mpo_config.yaml` where the model was made here or came with one.

    Args:
      folder: of the exported model.
      model: the folder or file that it was exported from.
      source: what the user called it.
      name: what the card calls it.
      kind: language model or reward model, after `ADAPTER` if only an adapter is written.
      dtype: of the weights.
      base: of an adapter, the model that it changes.
    """
    origin = find_origin(model)
    text = _foreign(source, kind, dtype, base) if origin is None else _card(origin, name, kind, dtype, base)
    write_text(folder / "README.md", [text])
    config = trained_config(model) if origin is None else origin.config
    if config is not None:
        write_text(folder / CONFIG_FILE, [to_yaml(config)])


def _front(kind: str, base: str | None, tags: list[str], datasets: list[str]) -> str:
    """The card's metadata, as the hub reads it; a base model and data sets are named where they are the hub's."""
    values: dict[str, Any] = {"library_name": "peft" if kind.startswith(ADAPTER) else "transformers", "tags": tags}
    values["pipeline_tag"] = "text-generation" if kind.endswith("language model") else "text-classification"
    if base is not None and is_hub_id(base) and on_this_machine(base) is None:
        values["base_model"] = base.partition("@")[0]
    if datasets:
        values["datasets"] = datasets
    return f"---\n{yaml.safe_dump(values, sort_keys=False)}---\n\n"


def _foreign(source: str, kind: str, dtype: str, base: str | None) -> str:
    form = ["--dtype", dtype] if base is None else ["--adapter"]
    return (
        _front(kind, base or source, ["mpo_jax"], [])
        + f"# {Path(source).name}\n\nA {kind} in {dtype}, written by `mpo export` of mpo_jax {__version__} from\n"
        f"`{source}`. It was not trained there: see the card of the model that it comes from.\n\n"
        f"```\n{shlex.join(['mpo', 'export', source, 'DIR', *form])}\n```\n"
    )


def _card(origin: Origin, name: str, kind: str, dtype: str, base: str | None) -> str:
    config, own = origin.config, origin.own
    hub = [
        path.removeprefix("hub:").partition("@")[0].partition(":")[0]
        for path in config.data.path
        if path.startswith("hub:")
    ]
    front = _front(kind, base or config.model.path, ["mpo_jax", "mixed-preference-optimization", own["stage"]], hub)
    unfinished = (
        "" if "summary" in own else "\n\nThe stage had not finished: these are the weights of its newest checkpoint."
    )
    again = _reproduce(origin, adapter=base is not None)
    parts = [
        f"# {name}\n\nA {kind} in {dtype}: {_what(origin)}. Made by mpo_jax {__version__}.{unfinished}",
        f"## Base model\n\n{_base(config, base)}",
        f"## How it was made\n\n{markdown(_steps(origin))}",
        f"## Data\n\n{_data(origin)}",
        f"## Metrics\n\n{_metrics(origin)}",
        f"## Configuration\n\nWhole and resolved in `{CONFIG_FILE}`.\n\n{_settings(origin)}",
        f"## Reproduce\n\n```\n{again}\n```\n\nThe same devices and versions give the same weights bit "
        "for bit, others to rounding.",
    ]
    return front + "\n\n".join(parts) + "\n"


def _what(origin: Origin) -> str:
    if origin.own["stage"] == "reward":
        return "the reward model, Bradley-Terry on human pairs"
    if origin.run is None:
        return f"what the stage {origin.own['stage']} leaves"
    return f"the final policy of the run `{origin.run}`"


def _base(config: Config, adapted: str | None) -> str:
    if adapted is not None:
        return (
            f"`{adapted}`. The adapter is what the last stage below changed in that model, and is of use on it alone. "
            "`mpo export --merge` writes the model with it folded in."
        )
    if config.model.path is not None:
        return f"`{config.model.path}`"
    shape = config.model.architecture
    return f"None: a Llama of {shape.num_layers} layers and width {shape.hidden_size}, trained from random weights."


def _steps(origin: Origin) -> list[dict[str, Any]]:
    rows = []
    for name, manifest in origin.lineage.items():
        summary, stage = manifest.get("summary", {}), manifest["stage"]
        subset = manifest["settings"].get("split", {}).get("subset")
        rows.append(
            {
                "stage": name,
                "trained on": f"{subset} {SUBSETS[stage]}"
                if subset
                else {"sft": "demonstrations"}.get(stage, "human pairs"),
                "reference": manifest["parents"].get("reference"),
                "rows": summary.get("prompts") or summary.get("pairs") or summary.get("tokens", {}).get("rows"),
                "updates": summary.get("steps"),
            }
        )
    return rows


def _data(origin: Origin) -> str:
    kind = {"toy": "The toy TL;DR world, which is made by a generator."}.get(origin.config.data.kind, "")
    rows = [
        {"source": source["source"], "read": source["read"], "kept": source["kept"],
         "dropped": ", ".join(f"{reason}: {count}" for reason, count in source["dropped"].items())}
        for manifest in origin.lineage.values()
        for source in manifest.get("summary", {}).get("data", [])
    ]  # fmt: skip
    return "\n\n".join(part for part in (kind, markdown(rows) if rows else "") if part) or "Not recorded."


def _metrics(origin: Origin) -> str:
    summary = origin.own.get("summary", {})
    rows: list[dict[str, Any]] = []
    if origin.evaluation is not None:
        for column, name in COLUMNS.items():
            if column in origin.evaluation:
                mean, error = origin.evaluation[column], origin.evaluation[f"{column}_se"]
                known = error if origin.evaluation["prompts"] > 1 else None
                rows.append({"on held-out prompts": name, "mean": mean, "s.e.": known})
        prompts = origin.evaluation["prompts"]
        note = f"\n\nMean and standard error over {prompts} prompts, one response each."
        return markdown(rows) + note + " Reward is the raw score of the reward model it was trained with."
    names = {"held_out_accuracy": "agreement with labels", "true_accuracy": "agreement with the truth"}
    rows = [{"on held-out pairs": name, "accuracy": summary[key]} for key, name in names.items() if summary.get(key)]
    if rows:
        return markdown(rows)
    last = {name: value for name, value in summary.get("train", {}).items() if not name.startswith(("timing", "perf"))}
    if not last:
        return "None recorded."
    return "Not evaluated. The last that training logged:\n\n" + markdown(
        [{"metric": k, "value": v} for k, v in last.items()]
    )


def _settings(origin: Origin) -> str:
    """The sections of the stages that made the model, without those of others."""
    stages = {manifest["stage"] for manifest in origin.lineage.values()}
    values = origin.config.model_dump(mode="json", include={*stages, "seed", "data", "select"})
    text = yaml.safe_dump(values, sort_keys=False)
    return f"<details><summary>Main sections</summary>\n\n```yaml\n{text}```\n\n</details>"


def _reproduce(origin: Origin, *, adapter: bool) -> str:
    """The commands that make the model again from the configuration beside the card."""
    stage, again = origin.own["stage"], "workdir=runs/again"
    if origin.run is not None:
        experiment = Variant.of(origin.run).experiment
        lines = [["mpo", stage, CONFIG_FILE, f"experiment={experiment}", again]]
        lines.append(["mpo", "export", f"runs/again/runs/{experiment}", "DIR", *(["--adapter"] if adapter else [])])
    else:
        lines = [["mpo", stage, CONFIG_FILE, again]]
    given = [f"# made by: {shlex.join(['mpo', *origin.command[1:]])}"] if len(origin.command) > 1 else []
    return "\n".join([*given, *map(shlex.join, lines)])
