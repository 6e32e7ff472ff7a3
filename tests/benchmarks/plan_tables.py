"""Makes the plans of launch/README.md, one JSON file for each configuration, target and stage, and prints its tables.

    python tests/benchmarks/plan_tables.py FOLDER                  # compile what FOLDER lacks, then print all tables
    python tests/benchmarks/plan_tables.py FOLDER --only 70b       # plans whose name contains 70b
    python tests/benchmarks/plan_tables.py FOLDER --print          # print from what is there

It can be stopped at any time: a plan that is there is not made again, and stages of a plan are compiled one at a time.
Needs both compilers: bash launch/setup.sh plan-gpu plan-tpu, in an environment that does not train. All plans take one
core some hours; each says how long it took.

Hours by stage count the published numbers of rows, which need no download. Their lengths are those of a configuration
whose rows and tokenizer are here, if one is named; otherwise every row counts at its full width:

    ... --hh-lengths configs/hh_smollm2.yaml data.path=helpful-base.test.jsonl.gz data.test_path=[] text.chat=false
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PRESETS = "configs/presets"
STAGES = ("sft", "reward", "select", "dpo", "ppo", "evaluate")
GIB = 2**30

SMALL = (
    "text.max_prompt_tokens=512", "text.max_response_tokens=512", "mesh.fsdp=1",
    "sft.train.batch_size=64", "sft.train.accumulation=64", "reward.train.batch_size=64",
    "reward.train.accumulation=64", "dpo.train.batch_size=64", "dpo.train.accumulation=64",
    "ppo.train.batch_size=32", "ppo.train.accumulation=32", "select.batch_size=32", "evaluate.batch_size=32",
    "model.logit_chunk=512", "model.remat=full",
)  # fmt: skip
"""One GPU: the smallest micro-batches, full recomputation, 512 + 512 tokens."""
ADAPTED = {"7B": "h100x1", "1B": "l4x1_1b", "3B": "l4x1_3b"}
"""Models with adapters on one GPU, and the presets that are merged after `lora.yaml`."""
OFFLOAD = ("runtime.offload_frozen=true", "runtime.offload_moments=true")
PAPER_TARGETS = {"a100x8": "", "2xa100x8": "a100_2x8", "v5p:2x2x2": "tpu_v5p_8", "v5p:2x4x4": "tpu_v5p_32"}
MODELS = {
    "0.5B": "Qwen/Qwen2.5-0.5B",
    "1B": "meta-llama/Llama-3.2-1B",
    "3B": "meta-llama/Llama-3.2-3B",
    "7B": "meta-llama/Llama-2-7b-hf",
}
ONE_GPU = "h100x1"
"""What the models of one GPU are compiled for: a program takes nearly the same memory on every GPU."""
CLASSES = {"24 GB": "l4x1", "40 GB": "a100-40x1", "80 GB": ONE_GPU}
"""GPUs that the peaks are compared with, the smallest first; of 24 GB those with the least memory, L4 and A10G."""
CHECKED = {"0.5B": "l4x1", "1B": "l4x1", "3B": "a100-40x1"}
"""Models that are compiled for a smaller GPU too, to see that it makes no difference."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """One plan: what `mpo plan` is called with."""

    name: str
    on: str
    arguments: tuple[str, ...]


def plans() -> list[Planned]:
    """All plans of the tables."""
    found = []
    for data in ("hh", "tldr"):
        for on, preset in PAPER_TARGETS.items():
            presets = (f"{PRESETS}/{preset}.yaml",) if preset else ()
            found.append(Planned(f"{data}-7b-{_file(on)}", on, (f"configs/{data}_llama2_7b.yaml", *presets)))
    found.append(Planned("hh-70b-8xh100x8", "8xh100x8", ("configs/hh_llama2_70b.yaml",)))
    big = ("configs/hh_llama2_70b.yaml", f"{PRESETS}/tpu_v5p_128.yaml")
    found.append(Planned("hh-70b-v5p-4x4x8", "v5p:4x4x8", big))
    for model, preset in ADAPTED.items():
        words = ("configs/hh_llama2_7b.yaml", f"{PRESETS}/lora.yaml", f"{PRESETS}/{preset}.yaml")
        found.append(Planned(f"lora-{model}", preset.split("_")[0], words))
    for model, on in (*((model, ONE_GPU) for model in MODELS), *CHECKED.items()):
        for name, extra in (("", ()), ("-offload", OFFLOAD)):
            arguments = ("configs/hh_llama2_7b.yaml", f"model.path={MODELS[model]}", *SMALL, *extra)
            found.append(Planned(f"one-{model}-{_file(on)}{name}", on, arguments))
    return found


def _file(on: str) -> str:
    return on.replace(":", "-")


ROWS = {
    "hh": {"demonstrations": 86311, "reward_pairs": 81995, "reward_watched": 4316, "reward_test": 4664,
           "held_out": 4664, "prompts": 86311, "human_pairs": 86311, "selected": 86311, "test_prompts": 4664},
    "tldr": {"demonstrations": 116722, "reward_pairs": 167827, "reward_watched": 8833, "reward_test": 8833,
             "held_out": 8833, "prompts": 176660, "human_pairs": 176660, "selected": 176660, "test_prompts": 6553},
}  # fmt: skip
"""Published numbers of rows of both data sets, before filters."""


def make(planned: Planned, folder: Path, lengths: dict[str, list[str]]) -> None:
    """Compiles the stages that the folder lacks, one process each, into NAME.STAGE.json."""
    stages = ("ppo",) if planned.name.endswith("-offload") else STAGES
    for stage in stages:
        file = folder / f"{planned.name}.{stage}.json"
        if file.is_file():
            continue
        part, begin = file.with_suffix(".part"), time.perf_counter()
        command = [sys.executable, __file__, str(part), "--one", planned.name, "--stage", stage]
        for data, words in lengths.items():
            command += [f"--{data}-lengths", *words] if words else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=_environment(), check=False)
        if not part.is_file():
            print(f"{planned.name} {stage}: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
            continue
        plan = json.loads(part.read_text(encoding="utf-8"))
        plan["took_s"] = round(time.perf_counter() - begin, 1)
        part.write_text(json.dumps(plan), encoding="utf-8")
        part.replace(file)
        verdict = "fits" if _fits(plan) else "does not fit"
        print(f"{planned.name} {stage}: {plan['took_s']:.0f} s, {verdict}", flush=True)


def make_one(planned: Planned, stage: str, file: Path, lengths: dict[str, list[str]]) -> None:
    """What `mpo plan --json` writes, with the published numbers of rows."""
    from mpo_jax.config.load import load_config
    from mpo_jax.data.corpus import base_tokenizer, load_corpus
    from mpo_jax.data.text import TextCodec
    from mpo_jax.pipeline.stages import count_rows
    from mpo_jax.runtime.files import write_json
    from mpo_jax.stages.shapes import Amounts
    from mpo_jax.tools.plan import compilers, host, hours, measure, report, targets

    config = load_config(ROOT / planned.arguments[0], [_absolute(word) for word in planned.arguments[1:]])
    target = targets.parse(planned.on, cpu_devices=config.mesh.num_devices)
    compilers.prepare(target)
    plan = measure.prepare(config, target)
    measured = plan.measure(plan.programs([stage]))
    data = "tldr" if planned.name.startswith("tldr") else "hh"
    amounts, basis = Amounts(**ROWS[data]), "published numbers of rows, every row at full width"
    if lengths[data]:
        other = load_config(ROOT / lengths[data][0], [_absolute(word) for word in lengths[data][1:]])
        sample = count_rows(other, load_corpus(other), TextCodec(base_tokenizer(other), other.text)).lengths
        amounts, basis = dataclasses.replace(amounts, lengths=sample), "published numbers of rows, sampled lengths"
    times = hours.stage_times(measured, plan, amounts)
    write_json(file, report.to_json(measured, plan, host.host_memory(measured, plan), times, basis))


def _absolute(word: str) -> str:
    return str(ROOT / word) if word.endswith(".yaml") else word


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONWARNINGS": "ignore"}


def _fits(plan: dict[str, Any]) -> bool:
    return all(program["fits"] for program in plan["programs"]) and all(host["fits"] for host in plan["hosts"])


class Made:
    """The plans that are in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def stage(self, name: str, stage: str) -> dict[str, Any] | None:
        file = self.folder / f"{name}.{stage}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    def peaks(self, name: str) -> dict[str, float]:
        """GiB of every program, by name; `usable` of the device."""
        found: dict[str, float] = {}
        for stage in STAGES:
            for program in (self.stage(name, stage) or {"programs": []})["programs"]:
                found[program["name"]] = program["peak"] / GIB
                found["usable"] = program["usable"] / GIB
        return found

    def largest(self, name: str, stage: str) -> float | None:
        """GiB of the stage's largest program."""
        plan = self.stage(name, stage)
        return None if plan is None else max(program["peak"] for program in plan["programs"]) / GIB


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_program(made: Made, columns: dict[str, str]) -> str:
    """GiB of every program; `usable` is the last row."""
    peaks = {title: made.peaks(name) for title, name in columns.items()}
    names = [name for name in dict.fromkeys(key for found in peaks.values() for key in found) if name != "usable"]
    rows = [
        [name, *(f"{found[name]:.1f}" if name in found else "" for found in peaks.values())]
        for name in [*names, "usable"]
    ]
    return table(["program", *columns], rows)


def on_one_gpu(made: Made) -> str:
    """GiB of each stage's largest program, and the smallest class of GPUs that holds it where the first does not."""
    from mpo_jax.tools.plan import targets

    usable = {title: targets.parse(on, cpu_devices=1).capacity / GIB for title, on in CLASSES.items()}
    first = next(iter(usable))

    def cell(peak: float | None) -> str:
        if peak is None:
            return ""
        smallest = next((title for title, room in usable.items() if peak <= room), "none")
        return f"{peak:.1f}" if smallest == first else f"{peak:.1f} ({smallest})"

    columns = [*((stage, "") for stage in STAGES), ("ppo", "-offload")]
    rows = [
        [path.partition("/")[2], *(cell(made.largest(f"one-{model}-{ONE_GPU}{end}", stage)) for stage, end in columns)]
        for model, path in MODELS.items()
    ]
    heading = ", ".join(f"{title}: {room:.1f}" for title, room in usable.items())
    return f"usable GiB: {heading}\n\n" + table(["model", *STAGES, "ppo, offloaded"], rows)


def on_smaller_gpus(made: Made) -> str:
    """By how many GiB, at most, a stage's largest program differs where it is compiled for a smaller GPU."""
    rows = []
    for model, on in CHECKED.items():
        pairs = [[made.largest(f"one-{model}-{_file(gpu)}", stage) for gpu in (on, ONE_GPU)] for stage in STAGES]
        whole = [abs(a - b) for a, b in pairs if a is not None and b is not None]
        rows.append([model, on, str(len(whole)), f"{max(whole):.2f}" if whole else ""])
    return table(["model", "compiled for", "stages", "largest difference, GiB"], rows)


def by_stage(made: Made, rows: dict[str, str], part: str, cell: Callable[[dict[str, Any]], str]) -> str:
    """A row for each plan and a column for each stage: `cell` of the first entry of the plan's list `part`."""

    def text(name: str, stage: str) -> str:
        found = (made.stage(name, stage) or {part: []})[part]
        return cell(found[0]) if found else ""

    return table(["", *STAGES], [[title, *(text(name, stage) for stage in STAGES)] for title, name in rows.items()])


def hours(times: dict[str, Any]) -> str:
    """By the rows' lengths, and at full width."""
    return f"{times['expected'] / 3600:.2g} ({times['full'] / 3600:.2g})"


def host_memory(host: dict[str, Any]) -> str:
    """GiB that are needed, and that a host is assumed to have."""
    return f"{host['needed'] / GIB:.0f} of {host['available'] / GIB:.0f}"


def compile_times(made: Made, columns: dict[str, str]) -> str:
    """Seconds that the compilers took for a plan's programs, in all and the longest."""
    rows = []
    for title, name in columns.items():
        programs = [p for stage in STAGES for p in (made.stage(name, stage) or {"programs": []})["programs"]]
        if programs:
            worst = max(programs, key=lambda p: p["compile_s"])
            total = sum(p["compile_s"] for p in programs)
            rows.append([title, f"{total:.0f}", f"{worst['name']}, {worst['compile_s']:.0f}"])
    return table(["plan", "all programs, s", "the longest, s"], rows)


def print_tables(folder: Path) -> None:
    made = Made(folder)
    seven = {f"{data.upper()} {on}": f"{data}-7b-{_file(on)}" for data in ("hh", "tldr")
             for on in PAPER_TARGETS}  # fmt: skip
    adapted = {f"{model}, {preset.split('_')[0]}": f"lora-{model}" for model, preset in ADAPTED.items()}
    seventy = {"8 x 8 H100": "hh-70b-8xh100x8", "v5p 4x4x8": "hh-70b-v5p-4x4x8"}
    everything = {**seven, **seventy, **adapted}
    for title, text in (
        ("LLaMA-2-7B, GiB a device", by_program(made, seven)),
        ("LLaMA-2-70B, GiB a device", by_program(made, seventy)),
        ("One GPU", on_one_gpu(made)),
        ("One GPU, compiled for a smaller one", on_smaller_gpus(made)),
        ("Adapters on one GPU, GiB", by_program(made, adapted)),
        (
            "Hours, by the rows' lengths (at full width)",
            by_stage(made, everything, "times", hours),
        ),
        ("Host memory, GiB", by_stage(made, everything, "hosts", host_memory)),
        ("Compile time", compile_times(made, everything)),
    ):
        print(f"\n### {title}\n\n{text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="plans whose name contains this")
    for data in ROWS:
        parser.add_argument(f"--{data}-lengths", nargs="+", default=[], metavar="WORD", help="CONFIG [KEY=VALUE ...]")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--print", dest="printed", action="store_true", help="compile nothing")
    given = parser.parse_args()
    lengths = {data: getattr(given, f"{data}_lengths") for data in ROWS}
    if given.one is not None:
        (planned,) = (planned for planned in plans() if planned.name == given.one)
        make_one(planned, given.stage, given.folder, lengths)
        return
    given.folder.mkdir(parents=True, exist_ok=True)
    if not given.printed:
        for planned in plans():
            if given.only in planned.name:
                make(planned, given.folder.resolve(), lengths)
    print_tables(given.folder)


if __name__ == "__main__":
    main()
