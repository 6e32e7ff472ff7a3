"""Launch files: clean scripts, well-formed manifests, commands that parse, launchers that find each other."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpo_jax.config.load import load_config
from mpo_jax.config.schema import Config

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch", ROOT / ".ci" / "run"]
JOBSETS = {"gpu": LAUNCH / "k8s_gpu_jobset.yaml", "tpu": LAUNCH / "k8s_tpu_jobset.yaml"}
COMMAND = [sys.executable, "-c", "from mpo_jax.cli.app import main; main()"]


def resolved(arguments: list[str]) -> Config:
    """The configuration that `mpo run` makes of its arguments, from the project's folder."""
    paths = [str(ROOT / a) if a.endswith(".yaml") and "=" not in a else a for a in arguments]
    return load_config(paths[0], tuple(paths[1:]))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert tool, "shellcheck comes with the test extra"
    done = subprocess.run([tool, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert script.read_text().startswith("#!/usr/bin/env bash\n")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_configurations_that_scripts_name_exist(script):
    for name in re.findall(r"configs/[\w/]+\.yaml", script.read_text()):
        assert (ROOT / name).is_file(), name


def job(kind: str) -> dict[str, Any]:
    manifest = yaml.safe_load(JOBSETS[kind].read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = manifest["spec"]["replicatedJobs"]
    return {"set": manifest["metadata"]["name"], "name": replicated["name"], **replicated["template"]["spec"]}


@pytest.mark.parametrize("kind", JOBSETS)
def test_jobsets(kind):
    """Fields that Kubernetes asks for, and what has to agree with what."""
    spec = job(kind)
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] >= 60
    (container,) = pod["containers"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    (per_pod,) = container["resources"]["limits"].values()
    assert container["command"][:2] == [".venv/bin/mpo", "run"]
    config = resolved([a.replace("$(JOB_COMPLETION_INDEX)", "0") for a in container["command"][2:]])
    assert config.mesh.num_devices == per_pod * spec["completions"]
    assert config.runtime.flags == "recommended" and config.workdir.startswith("/runs/")


def test_the_gpu_jobset_names_its_first_pod():
    spec = job("gpu")
    (container,) = spec["template"]["spec"]["containers"]
    command = [a.replace("$(JOB_COMPLETION_INDEX)", "1") for a in container["command"][2:]]
    processes = resolved(command).runtime.processes
    assert processes.coordinator == f"{spec['set']}-{spec['name']}-0-0.{spec['set']}:8476"
    assert (processes.count, processes.index) == (spec["completions"], 1)
    assert "JOB_COMPLETION_INDEX" in {variable["name"] for variable in container["env"]}


def test_the_tpu_jobset_s_topology_has_as_many_chips_as_the_mesh():
    spec = job("tpu")
    x, y, z = map(int, spec["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert x * y * z == 4 * spec["completions"]


def test_skypilot():
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert set(task) <= {"name", "resources", "num_nodes", "workdir", "file_mounts", "envs", "setup", "run"}
    _, count = task["resources"]["accelerators"].split(":")
    config = resolved([task["envs"]["CONFIG"], *task["envs"]["OVERRIDES"].split()])
    assert config.mesh.num_devices == int(count) * task["num_nodes"]
    assert any(config.workdir.startswith(mount) for mount in task["file_mounts"])
    for script in re.findall(r"launch/\w+\.sh", task["setup"] + task["run"]):
        assert (ROOT / script).is_file()


def test_slurm_directives():
    text = (LAUNCH / "slurm.sbatch").read_text()
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in text.splitlines() if line.startswith("#SBATCH")
    )
    assert "requeue" in options and options["ntasks-per-node"] == "1" and options["signal"].startswith("B:TERM@")
    default = re.search(r"set -- (.+)$", text, re.MULTILINE)
    assert default is not None
    config = resolved(default[1].split())
    assert config.mesh.num_devices == int(options["nodes"]) * int(options["gpus-per-node"])
    # the first directive after a command would be ignored
    assert max(text.index(f"#SBATCH --{name}") for name in options) < text.index("set -euo")


def test_the_single_host_script_takes_a_configuration_or_overrides(tmp_path):
    """With a stand-in for set-up and command."""
    (tmp_path / "launch").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(LAUNCH / "a100x8.sh", tmp_path / "launch")
    (tmp_path / "launch" / "setup.sh").write_text("echo setup $1\n")
    mpo = tmp_path / ".venv" / "bin" / "mpo"
    mpo.write_text('#!/bin/sh\necho "$XLA_PYTHON_CLIENT_MEM_FRACTION" "$@"\n')
    mpo.chmod(0o755)
    for arguments, expected in [
        ([], "configs/hh_llama2_7b.yaml runtime.flags=recommended"),
        (["seed=1"], "configs/hh_llama2_7b.yaml runtime.flags=recommended seed=1"),
        (["a.yaml", "b.yaml", "seed=1"], "a.yaml runtime.flags=recommended b.yaml seed=1"),
    ]:
        command = ["bash", str(tmp_path / "launch" / "a100x8.sh"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout == f"setup cuda12\n0.92 run {expected}\n"


STAND_IN = """#!/bin/sh
case "$*" in
  *default_backend*) echo gpu; exit;;
  *"jax.__version__"*) exit;;
esac
printf '%s\\n' "$*" >>"$CALLS"
case "$*" in *"$FAILS"*) echo it broke; exit 3;; esac
"""


@pytest.mark.parametrize(
    "groups,names",
    [
        (["run"], ["run_135m"]),
        (["kernels"], ["correctness", "attention"]),
        (
            [],
            ["correctness", "attention", "train_1b", "train_135m", "ppo_1b", "ppo_135m", "decode_1b", "decode_1b_one",
             "train_1b_lora", "train_135m_lora", "ppo_1b_lora", "ppo_135m_lora", "run_135m"],
        ),
    ],
)  # fmt: skip
def test_the_gpu_check_runs_the_groups_that_are_named(tmp_path, groups, names):
    """With a stand-in for Python: every part in the report, the failed one marked, and commands that parse."""
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", str(LAUNCH / "gpu_check.sh"), str(tmp_path / "out"), *groups], capture_output=True, text=True,
        check=False, env={**os.environ, "PYTHON": str(python), "CALLS": str(calls), "FAILS": "attention_kernels"},
    )  # fmt: skip
    assert done.returncode == int("attention" in names), done.stderr
    report = (tmp_path / "out" / ("-".join(["RESULTS", *groups]) + ".md")).read_text()
    assert re.findall(r"^## (\w+)", report, re.MULTILINE) == names and report in done.stdout
    assert ("attention: FAILED, status 3" in report) == ("attention" in names)
    lines = calls.read_text().splitlines()
    assert len(lines) == len(names)
    for line in lines:
        command = line.partition("main() ")[2].split()
        if command and command[0] == "run":
            config = resolved(command[1:])
            assert config.model.architecture.num_layers == 30 and config.experiment == ("mpo",)
        elif command:
            options = [word for word in command if re.match(r"[a-z_.]+=", word)]
            assert command[0] == "bench" and load_config(None, tuple(options)).model.architecture.num_layers in (16, 30)
            assert ("model.adapter.rank=16" in command) == ("_lora" in line)


def test_the_gpu_check_names_its_groups_and_says_where_there_is_no_gpu(tmp_path):
    script = ["bash", str(LAUNCH / "gpu_check.sh"), str(tmp_path / "out")]
    wrong = subprocess.run([*script, "speed"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2 and "no group speed; there are kernels full adapters run" in wrong.stderr
    without = subprocess.run(
        script,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"},
    )
    assert "no GPU that JAX can use (backend: cpu" in without.stdout


def test_no_group_of_the_gpu_check_takes_more_than_nine_minutes():
    """By the limits of its parts."""
    text = (LAUNCH / "gpu_check.sh").read_text()
    for group in ("kernels", "full", "adapters", "run"):
        body = re.search(rf"^{group}\(\) {{\n(.*?)^}}", text, re.MULTILINE | re.DOTALL)
        assert body is not None
        limits = re.findall(r"^  (?:part|bench) \w+ (\d+)", body[1], re.MULTILINE)
        assert 0 < sum(map(int, limits)) < 540


def test_the_tpu_script_passes_the_token_on_in_a_file(tmp_path):
    """gcloud logs its arguments, and everyone on a machine can list them."""
    keep = f'[ "$4" = ssh ] || {{ stat -c %a "$5" && cat "$5"; }} >> {tmp_path}/file'
    (tmp_path / "gcloud").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/said\n{keep}\n')
    (tmp_path / "gcloud").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    common = {**os.environ, "PATH": path, "TPU": "t", "ZONE": "z", "BUCKET": "gs://b/d", "TMPDIR": str(tmp_path)}
    script = ["bash", str(LAUNCH / "tpu_pod.sh"), "run", "a.yaml"]
    done = subprocess.run(script, capture_output=True, text=True, check=True, env={**common, "HF_TOKEN": "hf_planted"})
    said = (tmp_path / "said").read_text()
    assert (tmp_path / "file").read_text() == "600\nhf_planted"
    assert (
        'cd mpo_jax && HF_TOKEN="$(cat ~/.mpo_hf_token)" .venv/bin/mpo run a.yaml' in said
        and " t:.mpo_hf_token" in said
    )
    assert "hf_planted" not in said + done.stdout + done.stderr
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "gcloud", "said"], "the copy here is removed"
    (tmp_path / "said").unlink()
    subprocess.run(script, check=True, env={**common, "HF_TOKEN": ""})
    assert "HF_TOKEN" not in (tmp_path / "said").read_text()


def two(environment: list[dict[str, str]], *arguments: str) -> list[str]:
    """What two processes of `mpo doctor` print, each with its own environment."""
    common = {**os.environ, "HF_HUB_OFFLINE": "1"}
    running = [
        subprocess.Popen(
            [*COMMAND, "doctor", str(ROOT / "tests/configs/micro.yaml"), "mesh.fsdp=4", "runtime.cpu_devices=2",
             *(a.replace("$(JOB_COMPLETION_INDEX)", own.get("JOB_COMPLETION_INDEX", "")) for a in arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**common, **own},
        )
        for own in environment
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=200)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], said
    return said


def free_port(low: int = 0, high: int = 0) -> int:
    for port in range(low, high + 1):
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise AssertionError("no free port")


def check_pair(said: list[str]) -> None:
    assert "4 devices: " in said[0] and "; 2 processes" in said[0] and "2 processes, " in said[0]
    assert "4 devices: all-gather at" in said[0]
    assert "devices:" not in said[1], "the first process alone speaks"


@pytest.mark.thorough
def test_slurm_s_variables_join_two_processes():
    """JAX takes the first host of the step, and a port made from the job's number."""
    first = 65535 - 2**12 + 1
    number = free_port(first, 65535) - first
    step = {"SLURM_JOB_ID": str(number), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    check_pair(two([{**step, "SLURM_PROCID": str(i), "SLURM_LOCALID": "0"} for i in range(2)]))


@pytest.mark.thorough
def test_the_jobset_s_overrides_join_two_processes():
    """As in the manifest, with this machine for the first pod, inside what looks like Kubernetes."""
    (container,) = job("gpu")["template"]["spec"]["containers"]
    given = [a for a in container["command"] if a.startswith("runtime.processes.")]
    coordinator = f"runtime.processes.coordinator=127.0.0.1:{free_port(20000, 29999)}"
    given = [coordinator if "coordinator" in a else a for a in given]
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    check_pair(two([{**pod, "JOB_COMPLETION_INDEX": str(i)} for i in range(2)], *given))
