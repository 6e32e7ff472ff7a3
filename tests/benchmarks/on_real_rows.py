"""Times whole stages on real rows against TRL, and PPO also against Tunix, on the CPU: from a file of pairs to an
exported model, process and all.

    .venv/bin/python -m pip install torch==2.13.0      # where no GPU is wanted, and the index has a CPU build
    bash launch/setup.sh parity
    .venv/bin/python tests/benchmarks/on_real_rows.py --data hh-rlhf/helpful-base.test.jsonl.gz

The rows are the first of an HH-RLHF file that the strict parser keeps and that need no cut: up to 512 tokens of prompt
and 256 of response, by a byte-level BPE of 512 tokens that is trained on the file. The random Llama of 8.3M parameters
has 4096 rows of embeddings, so that its head has the share of the work that it has in a large model. Both sides read
the same JSONL file and model, take the same batches in the order of the file at one constant rate, and write a Hugging
Face folder. Their losses must agree in the first steps, to `TOLERANCE`.

Each side is a process of its own, and they take turns. Ours is the command, `mpo dpo` and so on, first with an empty
compilation cache (cold) and then with the one it left (warm); the stages before it are there already. TRL runs as
installed but for float32 and no gradient checkpointing, which would only slow it; it pads a batch to its longest row.
Time is taken from the start of the process, and parted where the first step begins (imports, rows, weights, in DPO the
reference's pass where it is made ahead) and where the last one ends (export). Ours compiles in its first step, and our
first step is counted as begun when the command says that the stage does. The ratio of processor time is of what both
processes had of the cores, which a busy machine changes less.

PPO samples up to 256 tokens to each prompt, scores them by a reward model and updates both models once. Samples are not
the same, and a random model seldom ends one early, so that both sides work on nearly as many tokens; TRL and Tunix draw
all 256 in any case. It needs TRL 1.12.0, the last release with a PPO trainer, in an environment of its own:

    .venv/bin/python tests/benchmarks/on_real_rows.py --only ppo --torch-python .venv-trl/bin/python --data FILE

ppo_tunix is the same against Tunix, as against_tunix.py sets it up, padded to the limits: Tunix compiles, so that its
one column is to be compared with our cold one, or in the parts. It saves its weights in one file of safetensors.

    .venv/bin/python tests/benchmarks/on_real_rows.py --only ppo_tunix --tunix-python .venv-tunix/bin/python --data FILE
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from peers import SPECIAL, VOCAB, machine, random_weights, versions, write_model
from trl_trainers import make_ppo_trainer, make_trainer
from tunix_trainers import ROPE_THETA, load_judge, load_model, make_cluster, make_learner, wait_for

PROMPT, RESPONSE = 512, 256
"""Tokens at most."""
MERGED = 512
"""Tokens of the vocabulary."""
TOLERANCE = 2e-3
COMPARED = 3
"""Steps whose losses must agree."""
ROOT = Path(__file__).resolve().parents[2]
WORKS = ("sft", "reward", "dpo", "dpo_precomputed", "ppo", "ppo_tunix")


class Taken(NamedTuple):
    """Seconds of one process, whole, in three parts and of the processor, and the losses of its steps."""

    whole: float
    before: float
    steps: float
    after: float
    processor: float
    losses: tuple[float, ...]


def write_inputs(folder: Path, data: str, count: int) -> int:
    """rows.jsonl, `model` and `reward`. Returns the rows' tokens, each prompt once."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from mpo_jax.config.load import load_config
    from mpo_jax.data.corpus import load_corpus

    config = load_config(None, ("data.kind=hh", f"data.path={data}", "data.validation_fraction=0"))
    pairs = load_corpus(config).pairs
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=MERGED, special_tokens=[*SPECIAL.values()], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((part for row in pairs for part in (row.prompt, row.chosen, row.rejected)), trainer)
    # as many ids as the embedding has rows: a tokenizer of far fewer belongs to another model. No text has the rest
    described = json.loads(tokenizer.to_str())
    described["model"]["vocab"] |= {f"<unused {number}>": number for number in range(MERGED, VOCAB)}
    tokenizer = Tokenizer.from_str(json.dumps(described))
    rows, tokens = [], 0
    for row in pairs:
        prompt, *both = (len(tokenizer.encode(part).ids) for part in (row.prompt, row.chosen, row.rejected))
        if prompt <= PROMPT and max(both) < RESPONSE and len(rows) < count:
            rows.append({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected})
            tokens += prompt + sum(both) + len(both)
    if len(rows) < count:
        sys.exit(f"{data} has {len(rows)} rows that need no cut, not {count}")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    rng = np.random.default_rng(0)
    weights = random_weights(rng)
    options: dict[str, Any] = {"rope_theta": ROPE_THETA, "positions": 1024}
    write_model(folder / "model", "LlamaForCausalLM", weights, tokenizer, **options)
    body = {name: value for name, value in weights.items() if name != "lm_head.weight"}
    # zeros, as ours begin
    score = {"score.weight": np.zeros((1, body["model.norm.weight"].size), np.float32)}
    write_model(folder / "reward", "LlamaForSequenceClassification", body | score, tokenizer, **options)
    return tokens


def timed(command: Sequence[str], begins: str) -> Taken:
    """Runs a process that prints `begins`, and then a line with the word step, its number, and its loss for each."""
    start, spent = time.perf_counter(), _of_the_processor()
    moments, losses, said, begun = [], [], [], None
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            words = line.split()
            if begun is None and begins in line:
                begun = time.perf_counter()
            if "step" in words and "loss" in words:
                moments.append(time.perf_counter())
                losses.append(float(words[words.index("loss") + 1]))
    end = time.perf_counter()
    if process.returncode or begun is None or not moments:
        sys.exit(f"{' '.join(command)}: status {process.returncode}. Its last words:\n{''.join(said[-30:])}")
    spent = _of_the_processor() - spent
    return Taken(end - start, begun - start, moments[-1] - begun, end - moments[-1], spent, tuple(losses))


def _of_the_processor() -> float:
    """Seconds that the processes started here, and ended, have had."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def ours(work: str, folder: Path, rows: int, batch: int, devices: int, cache: Path) -> Taken:
    """The command for one stage; those before it are made first, in one step, and are not timed."""
    stage = work.partition("_")[0]
    before = [] if stage == "sft" else ["sft.train.steps=1"]
    sizes = (f"text.max_prompt_tokens={PROMPT}", f"text.max_response_tokens={RESPONSE}", "text.length_buckets=4")
    with tempfile.TemporaryDirectory(dir=folder) as workdir:
        inputs = (f"model.path={folder / 'model'}", f"data.path={folder / 'rows.jsonl'}", f"workdir={workdir}")
        runtime = (f"runtime.compilation_cache={cache}", f"runtime.cpu_devices={devices}", f"mesh.data={devices}")
        config = ("configs/bench/" + f"{stage}.yaml", *inputs, *sizes, *before, *runtime)
        if stage == "ppo":
            config = (*config, f"reward.path={folder / 'reward'}")
        length = (f"{stage}.train.steps={rows // batch}", f"{stage}.train.batch_size={batch}")
        mpo = [sys.executable, "-m", "mpo_jax.cli"]
        for parent in {"sft": (), "reward": ("sft",)}.get(stage, ("sft", "reward")):
            subprocess.run([*mpo, parent, *config], check=True, cwd=ROOT, capture_output=True)
        return timed([*mpo, stage, *config, *length], f"make {stage}")


def theirs(work: str, python: str, folder: Path, rows: int, batch: int) -> Taken:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        worker = ["--worker", work, str(folder), out, str(batch)]
        return timed([python, str(Path(__file__).resolve()), "--data", "-", *worker], "training begins")


def trl_worker(work: str, folder: Path, out: Path, batch: int) -> None:
    """TRL's trainer of the stage, over all rows, to a saved model."""
    from transformers import AutoTokenizer, TrainerCallback

    class Said(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            print("trl step", state.global_step, "loss", losses[-1], flush=True)

    rows, losses = _rows(folder), [0.0]
    if work == "ppo":
        tokenizer = AutoTokenizer.from_pretrained(folder / "model")
        prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
        trainer = make_ppo_trainer(folder, prompts, Said(), batch_size=batch, length=RESPONSE, episodes=len(prompts))
    else:
        trainer, losses = make_trainer(
            work, folder, rows, Said(), batch_size=batch, num_train_epochs=1, max_length=PROMPT + RESPONSE,
            dataloader_drop_last=True,
        )  # fmt: skip
    print(versions("trl", "transformers", "torch"), flush=True)
    print("training begins", flush=True)
    trainer.train()
    trainer.save_model(str(out / "model"))


def tunix_worker(folder: Path, out: Path, batch: int) -> None:
    """Tunix's PPO over all rows, to saved weights of the actor."""
    import jax
    from flax import nnx
    from safetensors.numpy import save_file

    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))
    texts = np.asarray([row["prompt"] for row in _rows(folder)])
    with mesh:
        models = {"actor": load_model(folder), "reference": load_model(folder)}
        models |= {"critic": load_judge(folder), "reward": load_judge(folder)}
        cluster = make_cluster(folder, mesh, models, prompt=PROMPT, response=RESPONSE)

        def batches() -> Iterator[dict[str, Any]]:
            for begin in range(0, len(texts), batch):
                yield {"prompts": texts[begin : begin + batch]}
                # asked for the next: the updates of this one are under way
                wait_for(cluster)
                print("tunix step", begin // batch + 1, "loss", 0.0, flush=True)

        learner = make_learner(cluster)
        print(versions("google-tunix", "jax", "flax"), flush=True)
        print("training begins", flush=True)
        learner.train(batches())
        state = nnx.to_pure_dict(nnx.state(cluster.actor_trainer.model, nnx.Param))
    weights = {jax.tree_util.keystr(path): np.asarray(value) for path, value in jax.tree.leaves_with_path(state)}
    save_file(weights, out / "model.safetensors")


def _rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def _parts(side: list[Taken]) -> str:
    return " + ".join(f"{statistics.median(values):.0f}" for values in list(zip(*side, strict=True))[1:4])


def line(work: str, count: int, cold: Taken, warm: list[Taken], others: list[Taken]) -> str:
    """A row of the table: seconds a row of the file."""
    ours, peer = (statistics.median(taken.whole for taken in side) for side in (warm, others))
    ours_used, peer_used = (statistics.median(taken.processor for taken in side) for side in (warm, others))
    pairs = [] if work.startswith("ppo") else list(zip(cold.losses[:COMPARED], others[0].losses, strict=False))
    apart = f"{max(abs(a / b - 1) for a, b in pairs):.0e}" if pairs else "-"
    return (
        f"| {work} | {cold.whole / count:.3f} | {ours / count:.3f} | {peer / count:.3f} | {peer / cold.whole:.2f} "
        f"| {peer / ours:.2f} | {peer_used / ours_used:.2f} | {_parts(warm)} | {_parts(others)} | {apart} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="HH-RLHF file")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--devices", type=int, default=1, help="simulated devices of our side, at most one a core")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each side; the cold one comes once")
    parser.add_argument("--only", default=",".join(WORKS), help=f"comma-separated, of {', '.join(WORKS)}")
    parser.add_argument(
        "--torch-python", default=sys.executable, metavar="PATH", help="interpreter of TRL's environment"
    )
    parser.add_argument("--tunix-python", default=sys.executable, metavar="PATH", help="that of Tunix's")
    parser.add_argument("--worker", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work, folder, out, batch = given.worker
        if work == "ppo_tunix":
            tunix_worker(Path(folder), Path(out), int(batch))
        else:
            trl_worker(work, Path(folder), Path(out), int(batch))
        return
    names = [name.strip() for name in given.only.split(",") if name.strip()]
    if unknown := set(names) - set(WORKS):
        parser.error(f"--only knows {', '.join(WORKS)}, not {', '.join(sorted(unknown))}")
    count = given.rows - given.rows % given.batch
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tokens = write_inputs(folder, given.data, count)
        print(
            f"{machine()}; {count} rows, {tokens / count:.0f} tokens a pair, batches of {given.batch}, "
            f"our devices: {given.devices}\n"
        )
        print("| stage | ours cold, s a row | ours warm | theirs | times as fast, cold | warm "
              "| processor time, warm | ours warm, parts in s | theirs, parts in s | losses apart |")  # fmt: skip
        print("|---|---|---|---|---|---|---|---|---|---|")
        for work in names:
            cache = folder / f"cache-{work}"
            our_side = partial(ours, work, folder, count, given.batch, given.devices, cache)
            cold = our_side()
            warm, others = [], []
            python = given.tunix_python if work == "ppo_tunix" else given.torch_python
            for _ in range(given.rounds):
                others.append(theirs(work, python, folder, count, given.batch))
                warm.append(our_side())
            row = line(work, count, cold, warm, others)
            if not work.startswith("ppo") and not np.allclose(
                cold.losses[:COMPARED], others[0].losses[:COMPARED], rtol=TOLERANCE, atol=0
            ):
                sys.exit(f"{work}: the sides do not agree\n{cold.losses[:COMPARED]}\n{others[0].losses[:COMPARED]}")
            print(row, flush=True)


if __name__ == "__main__":
    main()
