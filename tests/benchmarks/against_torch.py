"""Times mpo_jax against TRL's trainers and transformers' generate on the CPU: equal weights, rows, threads and machine.

    .venv/bin/python -m pip install torch==2.13.0      # where no GPU is wanted, and the index has a CPU build
    bash launch/setup.sh parity
    .venv/bin/python tests/benchmarks/against_torch.py [--only sft,dpo] [--rounds 5]

Under 6 minutes on two quiet cores; prints a Markdown table. It makes its own inputs: a random Llama of 8.3M parameters
and rows of exactly 128 + 128 tokens. Every side of every line is a process of its own, so that peak memory is its own
too (libraries and compilation included); while one is timed the other waits. First both must give equal losses for
three steps (1e-4), or equal greedy tokens; then they take turns. Other work on the machine spoils it: torch's threads
wait for each other at every operation.

A step is forward, backward, clipping and AdamW, and for DPO the reference where it is not precomputed; reading and
collating the next rows is left out on both sides. TRL runs as installed but for float32 and no gradient checkpointing,
which would only slow it. Sampling draws at temperature 1 from all ids but EOS.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
SIDES = ("mpo_jax", "torch")
VOCAB, HIDDEN, MLP, LAYERS, HEADS, HEAD_DIM = 4096, 288, 768, 6, 6, 48
PAD, UNK, EOS = 0, 1, 2
LENGTH = 128
"""Tokens of a prompt, of a response (EOS included), and of a sample."""
SAMPLED_PROMPT = 64
ROWS, PAIRS = 160, 80
"""As many rows as the SFT steps take, and as the steps on pairs take; none comes twice."""
MATRIX = 2048
GREEDY_TOKENS = 16
TOLERANCE = 1e-4
WARM_STEPS = 3

WORK = {
    # name: (title, batch, turns of how many steps, what a step is counted in)
    "matmul": (f"float32 matmul, {MATRIX} cubed", 1, 5, "GFLOP/s"),
    "sft": ("SFT step, 8 rows", 8, 3, "s"),
    "reward": ("reward step, 4 pairs", 4, 3, "s"),
    "dpo": ("DPO step, 4 pairs, reference each step", 4, 3, "s"),
    "dpo_precomputed": ("DPO step, 4 pairs, reference precomputed", 4, 3, "s"),
    "sample16": (f"sampling, {SAMPLED_PROMPT} + {LENGTH} tokens, batch 16", 16, 1, "tokens/s"),
    "sample1": (f"sampling, {SAMPLED_PROMPT} + {LENGTH} tokens, batch 1", 1, 2, "tokens/s"),
}


def write_inputs(folder: Path) -> None:
    """`model` and `reward` (Hugging Face folders with one tokenizer), rows.jsonl, and prompts.npy [16 P]."""
    rng = np.random.default_rng(0)
    weights = _random_weights(rng)
    head = {"lm_head.weight": weights.pop("lm_head.weight")}
    _write_model(folder / "model", "LlamaForCausalLM", weights | head)
    score = {"score.weight": rng.normal(0, 0.1, (1, HIDDEN)).astype(np.float32)}
    _write_model(folder / "reward", "LlamaForSequenceClassification", weights | score)

    def text(tokens: int) -> str:
        # a space in front, so that the words of a prompt and its response stay apart where they are joined as text
        return "".join(f" w{token}" for token in rng.integers(EOS + 1, VOCAB, tokens))

    rows = [{"prompt": text(LENGTH), "chosen": text(LENGTH - 1), "rejected": text(LENGTH - 1)} for _ in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    np.save(folder / "prompts.npy", rng.integers(EOS + 1, VOCAB, (16, SAMPLED_PROMPT)).astype(np.int32))


def _random_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
    def matrix(rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, 0.02, (rows, columns)).astype(np.float32)

    ones = np.ones(HIDDEN, np.float32)
    weights = {"model.embed_tokens.weight": matrix(VOCAB, HIDDEN), "lm_head.weight": matrix(VOCAB, HIDDEN)}
    weights["model.norm.weight"] = ones
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        weights |= {f"{prefix}self_attn.{name}_proj.weight": matrix(HEADS * HEAD_DIM, HIDDEN) for name in "qkv"}
        weights[f"{prefix}self_attn.o_proj.weight"] = matrix(HIDDEN, HEADS * HEAD_DIM)
        weights |= {f"{prefix}mlp.{name}_proj.weight": matrix(MLP, HIDDEN) for name in ("gate", "up")}
        weights[f"{prefix}mlp.down_proj.weight"] = matrix(HIDDEN, MLP)
        weights |= {f"{prefix}{name}_layernorm.weight": ones for name in ("input", "post_attention")}
    return weights


def _write_model(folder: Path, architecture: str, weights: dict[str, np.ndarray]) -> None:
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": [architecture], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM,
        "vocab_size": VOCAB, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "dtype": "float32", "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip
    if "score.weight" in weights:
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    words = [*special.values(), *(f"w{token}" for token in range(EOS + 1, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


class Channel:
    """Between a worker and the process that asks: `next` before each step, `done` after it.

    A worker is one side of one line. Asked over standard input for so many steps, it answers with a line of JSON.
    """

    def __init__(self) -> None:
        # libraries print to standard output too
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._left = 0
        self._seconds: list[float] = []
        self._values: list[float] = []

    def ready(self, values: list[float], about: str = "") -> None:
        """Says that the steps can begin, and what the two sides must agree on."""
        self._answer({"values": values, "about": about})

    def next(self) -> None:
        """Returns when a step is wanted; ends the process when none is wanted any more."""
        if self._left:
            return
        line = sys.stdin.readline().strip()
        if not line or line == "end":
            # kibibytes on Linux
            self._answer({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024})
            self._out.flush()
            os._exit(0)
        self._left, self._seconds, self._values = int(line), [], []

    def done(self, seconds: float, value: float) -> None:
        """Takes what a step gave, and answers after the last one that was asked for."""
        self._seconds.append(seconds)
        self._values.append(value)
        self._left -= 1
        if not self._left:
            self._answer({"seconds": self._seconds, "values": self._values})

    def repeat(self, step: Callable[[], Callable[[], float]]) -> None:
        """Steps as long as they are wanted: `step` prepares one, what it returns is timed and gives its value."""
        while True:
            self.next()
            timed = step()
            begin = time.perf_counter()
            value = timed()
            self.done(time.perf_counter() - begin, value)

    def _answer(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


def matrices() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, MATRIX, MATRIX), np.float32)
    return a, b


def mpo_jax_worker(work: str, folder: Path, channel: Channel) -> None:
    import jax

    if work == "matmul":
        a, b = map(jax.numpy.asarray, matrices())
        multiply = jax.jit(jax.numpy.matmul)
        channel.ready([], f"jax {jax.__version__}")
        channel.repeat(lambda: lambda: float(multiply(a, b).block_until_ready()[0, 0]))
    elif work.startswith("sample"):
        mpo_jax_sampling(WORK[work][1], folder, channel)
    else:
        mpo_jax_training(work, folder, channel)


def _bench_config(stage: str, folder: Path, *overrides: str) -> Any:
    from mpo_jax import runtime
    from mpo_jax.config import load_config

    path = Path(__file__).resolve().parents[2] / "configs" / "bench" / f"{stage}.yaml"
    inputs = (f"model.path={folder / 'model'}", f"data.path={folder / 'rows.jsonl'}", f"workdir={folder}")
    config = load_config(path, (*inputs, "runtime.compilation_cache=null", *overrides), stage=stage)
    runtime.start(config.runtime)
    return config


def mpo_jax_training(work: str, folder: Path, channel: Channel) -> None:
    """The stages' own jitted steps on the batches that their commands would take."""
    import jax
    import jax.numpy as jnp

    from mpo_jax.data.batches import Buckets, TrainBatches, map_batches
    from mpo_jax.model import functional, loading
    from mpo_jax.sharding import make_mesh, place_batch
    from mpo_jax.stages import dpo, reward, sft
    from mpo_jax.train import init_state

    stage, size = work.removesuffix("_precomputed"), WORK[work][1]
    rows = ROWS if stage == "sft" else PAIRS
    config = _bench_config(stage, folder, f"train.batch_size={size}", f"data.max_rows={rows}")
    mesh, optim = make_mesh(config.mesh), getattr(config, stage).train.optim
    examples = _examples(config, stage)
    buckets = Buckets.of(examples, 1)
    batches = TrainBatches(examples, buckets, size, 0, shuffle=False)
    with jax.set_mesh(mesh):
        scalar = stage == "reward"
        model, params = loading.load(folder / ("reward" if scalar else "model"), config, mesh, scalar=scalar)
        if stage == "sft":
            update = sft.make_step(model, optim, 1, mesh)
        elif stage == "reward":
            update = reward.make_step(model, optim, config.reward.loss, 1, mesh)
        else:
            update = dpo.make_step(model, optim, dpo.DpoLoss.of(config.dpo), 1, mesh)
        logps = functional.make_response_logps(model, mesh)
        known_EN = np.zeros((len(examples), 0), np.float32)
        if work == "dpo_precomputed":
            known_EN = map_batches(examples, buckets, size, partial(_placed, logps, params, mesh))
        # the state holds a copy, so that the reference stays as it is; elsewhere it is in nobody's memory
        state, k, rate = init_state(params, optim, mesh), 0, jnp.float32(optim.learning_rate)
        reference = params if work == "dpo" else None
        params = None
        channel.ready([])

        def step() -> Callable[[], float]:
            nonlocal k
            host, known = batches[k].rows, known_EN[k * size : (k + 1) * size]
            k += 1

            def timed() -> float:
                nonlocal state
                batch = place_batch(host, mesh)
                if stage == "dpo":
                    batch = batch, place_batch(known, mesh) if reference is None else logps(reference, batch)
                state, metrics = jax.block_until_ready(update(state, batch, rate))
                return float(metrics["loss"].value)

            return timed

        channel.repeat(step)


def _placed(function: Any, params: Any, mesh: Any, rows: Any) -> Any:
    from mpo_jax.sharding import place_batch

    return function(params, place_batch(rows, mesh))


def _examples(config: Any, stage: str) -> list[Any]:
    """The stage's tokenized rows in file order."""
    from mpo_jax.data.corpus import base_tokenizer, load_corpus
    from mpo_jax.data.tokens import tokenize
    from mpo_jax.text import TextCodec

    corpus = load_corpus(config)
    rows = [(row.prompt, (row.chosen, row.rejected)) for row in corpus.pairs]
    if stage == "sft":
        rows = [(row.prompt, (row.response,)) for row in corpus.demonstrations]
    return tokenize(TextCodec(base_tokenizer(config), config.text), rows)[0]


def mpo_jax_sampling(batch_size: int, folder: Path, channel: Channel) -> None:
    import jax
    import jax.numpy as jnp

    from mpo_jax.data.batches import Widths, collate
    from mpo_jax.data.tokens import Example
    from mpo_jax.generate import Sampling, make_generate
    from mpo_jax.model import loading
    from mpo_jax.sharding import make_mesh, place_batch

    config = _bench_config("ppo", folder)
    mesh = make_mesh(config.mesh)
    examples = [Example(row, ()) for row in np.load(folder / "prompts.npy")[:batch_size]]
    with jax.set_mesh(mesh):
        model, params = loading.load(folder / "model", config, mesh)
        prompts = place_batch(collate(examples, Widths.of(examples), num_responses=0), mesh)
        index = place_batch(np.zeros(batch_size, np.uint32), mesh)
        allowed = jnp.ones(VOCAB, bool).at[jnp.asarray([PAD, UNK, EOS])].set(False)

        def drawn(sampling: Sampling, seed: int) -> Any:
            generate = make_generate(model, sampling, EOS, mesh)
            return jax.block_until_ready(generate(params, prompts, jax.random.key(seed), index, allowed))[0]

        greedy = drawn(Sampling(GREEDY_TOKENS, greedy=True), 0)
        channel.ready(np.asarray(greedy.response).ravel().tolist())
        seeds = iter(range(10**6))

        def step() -> Callable[[], float]:
            seed = next(seeds)
            return lambda: int(drawn(Sampling(LENGTH), seed).response_len.sum())

        channel.repeat(step)


def torch_worker(work: str, folder: Path, channel: Channel) -> None:
    import torch

    torch.set_num_threads(THREADS)
    if work == "matmul":
        a, b = map(torch.from_numpy, matrices())
        mkl = "with MKL" if torch.backends.mkl.is_available() else "without MKL"
        channel.ready([], f"torch {torch.__version__} ({mkl}, {torch.backends.cpu.get_cpu_capability()})")
        channel.repeat(lambda: lambda: float((a @ b)[0, 0]))
    elif work.startswith("sample"):
        torch_sampling(WORK[work][1], folder, channel)
    else:
        torch_training(work, folder, channel)


def torch_training(work: str, folder: Path, channel: Channel) -> None:
    """TRL's trainer of the stage, which is held up before each of its steps until one is wanted."""
    import torch
    from datasets import Dataset
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        TrainerCallback,
    )

    stage = work.removesuffix("_precomputed")
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    options: dict[str, Any] = {
        "output_dir": str(folder / f"trl-{work}"), "per_device_train_batch_size": WORK[work][1], "max_steps": 10**6,
        "learning_rate": 1e-5, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "use_cpu": True,
        "bf16": False, "fp16": False, "gradient_checkpointing": False, "train_sampling_strategy": "sequential",
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "max_length": 2 * LENGTH,
    }  # fmt: skip
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    model = kind.from_pretrained(folder / ("reward" if stage == "reward" else "model"), dtype=torch.float32)
    if stage == "sft":
        from trl import SFTConfig as Arguments
        from trl import SFTTrainer as Trainer

        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    elif stage == "reward":
        from trl import RewardConfig as Arguments
        from trl import RewardTrainer as Trainer
    else:
        from trl import DPOConfig as Arguments
        from trl import DPOTrainer as Trainer

        options |= {"beta": 0.1, "precompute_ref_log_probs": work == "dpo_precomputed"}

    class Timed(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            channel.next()
            self.begin = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            channel.done(time.perf_counter() - self.begin, float(losses.pop()))

    trainer = Trainer(
        model=model,
        args=Arguments(**options),
        train_dataset=Dataset.from_list(rows[: ROWS if stage == "sft" else PAIRS]),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
        callbacks=[Timed()],
    )
    losses: list[Any] = []
    training_step = trainer.training_step

    # what a trainer logs is rounded
    def kept(*arguments: Any, **named: Any) -> Any:
        losses.append(training_step(*arguments, **named))
        return losses[-1]

    trainer.training_step = kept  # type: ignore[method-assign]
    channel.ready([])
    trainer.train()


def torch_sampling(batch_size: int, folder: Path, channel: Channel) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    ids = torch.from_numpy(np.load(folder / "prompts.npy")[:batch_size]).long()

    def drawn(tokens: int, **options: Any) -> Any:
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, suppress_tokens=[PAD, UNK, EOS],
            pad_token_id=PAD, **options,
        )  # fmt: skip
        return out[:, ids.shape[1] :]

    channel.ready(drawn(GREEDY_TOKENS, do_sample=False).flatten().tolist())
    # transformers' default is the 50 likeliest tokens
    channel.repeat(lambda: lambda: drawn(LENGTH, do_sample=True, temperature=1.0, top_k=0, top_p=1.0).numel())


class Worker:
    """One side of one line, seen by the process that asks."""

    def __init__(self, side: str, work: str, folder: Path):
        threads = {f"{library}_NUM_THREADS": str(THREADS) for library in ("OMP", "MKL", "OPENBLAS")}
        caches = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._log = folder / f"{side}-{work}.log"
        self.name = f"{side} {work}"
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [sys.executable, __file__, "--worker", side, work, str(folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, **threads, **caches, "JAX_PLATFORMS": "cpu"},
            )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            log = self._log.read_text(encoding="utf-8", errors="replace")
            sys.exit(f"{self.name} ended early, status {self._process.wait()}. Its last words:\n{log[-3000:]}")
        return json.loads(line)

    def ask(self, what: int | str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@contextmanager
def workers(work: str, folder: Path) -> Iterator[list[Worker]]:
    started = [Worker(side, work, folder) for side in SIDES]
    try:
        yield started
    finally:
        for worker in started:
            worker.stop()


def measure(work: str, folder: Path, rounds: int) -> tuple[dict[str, Any], list[str]]:
    """A line of the table, and what each side says of itself.

    Exits where the sides do not compute the same.
    """
    _, batch_size, steps, unit = WORK[work]
    with workers(work, folder) as sides:
        ready = [side.answer() for side in sides]
        warm = [side.ask(WARM_STEPS) for side in sides]
        ours, theirs = (np.asarray(r["values"] + w["values"]) for r, w in zip(ready, warm, strict=True))
        if not np.allclose(ours, theirs, rtol=TOLERANCE, atol=0):
            sys.exit(f"{work}: the sides do not agree, so their times mean nothing\n{ours}\n{theirs}")
        taken: list[list[float]] = [[], []]
        for _ in range(rounds):
            for side, seconds in zip(sides, taken, strict=True):
                seconds += side.ask(steps)["seconds"]
        peaks = [side.ask("end")["peak_mib"] for side in sides]
    done = {"s": None, "tokens/s": batch_size * LENGTH, "GFLOP/s": 2 * MATRIX**3 / 1e9}[unit]
    values = [np.quantile(np.asarray(s) if done is None else done / np.asarray(s), (0.5, 0, 1)) for s in taken]
    speed = np.median(taken[1]) / np.median(taken[0])
    # greedy tokens are compared for equality, which says nothing as a number
    last = "" if work.startswith("sample") or work == "matmul" else f"{ours[-1]:.6f} / {theirs[-1]:.6f}"
    row = {"unit": unit, "values": values, "speed": speed, "peaks": peaks, "loss": last}
    return row, [r["about"] for r in ready if r["about"]]


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| work | unit | mpo_jax (min to max) | TRL, transformers, torch (min to max) | times as fast "
        "| peak MiB, ours | peak MiB, theirs | loss at step 3, ours / theirs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for work, row in rows.items():
        digits = 3 if row["unit"] == "s" else 0
        ours, theirs = ("{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*v, d=digits) for v in row["values"])
        peaks = " | ".join(f"{peak:.0f}" for peak in row["peaks"])
        lines.append(
            f"| {WORK[work][0]} | {row['unit']} | {ours} | {theirs} | {row['speed']:.2f} | {peaks} | {row['loss']} |"
        )
    return "\n".join(lines)


def machine() -> str:
    """The processor, and what MKL does on it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = fields.get("model name", platform.processor() or platform.machine())
    note = ""
    if fields.get("vendor_id") == "AuthenticAMD":
        note = "; MKL does not take its AVX-512 path on AMD processors, and torch was left as installed"
    return f"{name}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable, {THREADS} threads a side{note}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(WORK), help=f"comma-separated, of {', '.join(WORK)}")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        side, work, folder = given.worker
        # before JAX and torch start, which count the cores that they may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
        (mpo_jax_worker if side == "mpo_jax" else torch_worker)(work, Path(folder), Channel())
        return
    names = [name.strip() for name in given.only.split(",") if name.strip()]
    if unknown := set(names) - set(WORK):
        parser.error(f"--only knows {', '.join(WORK)}, not {', '.join(sorted(unknown))}")
    if WARM_STEPS + given.rounds * WORK["sft"][2] > ROWS // WORK["sft"][1]:
        parser.error(f"--rounds {given.rounds}: there are rows for {ROWS // WORK['sft'][1]} steps only")
    begin, rows, about = time.perf_counter(), {}, []
    with tempfile.TemporaryDirectory() as scratch:
        write_inputs(Path(scratch))
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            rows[name], said = measure(name, Path(scratch), given.rounds)
            about += said
    libraries = [*about, *(f"{name} {version(name)}" for name in ("transformers", "trl"))]
    print(f"{machine()}\n{', '.join(libraries)}; {given.rounds} turns, {time.perf_counter() - begin:.0f} s in all\n")
    print(table(rows))


if __name__ == "__main__":
    main()
