"""How long a stage's cold start compiles, one program after another and in threads, for a target that is not there.

    python tests/benchmarks/parallel_compile.py configs/hh_llama2_7b.yaml --on a100x8 --threads 1 2 --repeats 2

Needs the target's compiler (launch/setup.sh plan-gpu or plan-tpu). Every measurement is a process of its own, since JAX
keeps what it has compiled; numbers of threads alternate. Prints wall and CPU seconds: on a busy machine compare the CPU
seconds, which threads leave as they are, and the wall seconds of neighbouring runs.
"""

import argparse
import json
import os
import subprocess
import sys
import time


def measure(config: str, on: str, stage: str, threads: int) -> dict[str, float]:
    """Compiles all programs of the stage in this process."""
    from mpo_jax.config.load import load_config
    from mpo_jax.stages.compiling import compile_all
    from mpo_jax.tools.plan import compilers, measure, targets

    resolved = load_config(config)
    target = targets.parse(on, cpu_devices=resolved.mesh.num_devices)
    compilers.prepare(target)
    plan = measure.prepare(resolved, target)
    programs = list(plan.programs([stage]))
    wall, cpu = time.perf_counter(), time.process_time()
    compile_all([programs], plan.mesh, threads)
    return {
        "programs": len(programs),
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--on", default="a100x8")
    parser.add_argument("--stage", default="ppo")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one is not None:
        print(json.dumps(measure(given.config, given.on, given.stage, given.one)))
        return
    for _ in range(given.repeats):
        for threads in given.threads:
            command = [sys.executable, __file__, given.config, "--on", given.on, "--stage", given.stage]
            done = subprocess.run(
                [*command, "--one", str(threads)],
                capture_output=True, text=True, check=True, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            took = f"{found['wall']:.0f} s, {found['cpu']:.0f} s of CPU"
            print(f"{threads} threads: {found['programs']} programs in {took}", flush=True)


if __name__ == "__main__":
    main()
