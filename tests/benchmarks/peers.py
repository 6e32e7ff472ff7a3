"""What the benchmarks against other libraries share: inputs, mpo_jax's own side, workers that take turns, the table.

A line of the table is one kind of work, and each of its two sides a process of its own, so that peak memory is its own
too. While one is timed the other waits. Before that both must give equal values.
"""

import argparse
import dataclasses
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
from types import SimpleNamespace
from typing import Any

import numpy as np

THREADS = 2
VOCAB, HIDDEN, MLP, LAYERS, HEADS, HEAD_DIM = 4096, 288, 768, 6, 6, 48
PAD, UNK, EOS = 0, 1, 2
SPECIAL = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
"""In the order of their ids."""
LENGTH = 128
"""Tokens of a prompt, of a response (EOS included), and of a sample."""
SAMPLED_PROMPT = 64
ROWS, PAIRS = 160, 80
"""As many rows as the SFT steps take, and as the steps on pairs take; none comes twice."""
MATRIX = 2048
GREEDY_TOKENS = 16
TOLERANCE = 1e-4
WARM_STEPS = 3
ROLLOUTS = 8

_PPO = f"PPO iteration, {ROLLOUTS} rollouts of {LENGTH} + {LENGTH} tokens"
WORK = {
    # name: (title, batch, turns of how many steps, what a step is counted in)
    "matmul": (f"float32 matmul, {MATRIX} cubed", 1, 5, "GFLOP/s"),
    "sft": ("SFT step, 8 rows", 8, 3, "s"),
    "reward": ("reward step, 4 pairs", 4, 3, "s"),
    "dpo": ("DPO step, 4 pairs, reference each step", 4, 3, "s"),
    "dpo_precomputed": ("DPO step, 4 pairs, reference precomputed", 4, 3, "s"),
    "ppo": (_PPO, ROLLOUTS, 2, "s"),
    "ppo_one_pass": (f"{_PPO}, ours with ppo.one_pass", ROLLOUTS, 2, "s"),
    "sample16": (f"sampling, {SAMPLED_PROMPT} + {LENGTH} tokens, batch 16", 16, 1, "tokens/s"),
    "sample1": (f"sampling, {SAMPLED_PROMPT} + {LENGTH} tokens, batch 1", 1, 2, "tokens/s"),
}


def write_inputs(folder: Path, rope_theta: float) -> None:
    """`model` and `reward` (Hugging Face folders with one tokenizer), rows.jsonl, and prompts.npy [16 P]."""
    rng = np.random.default_rng(0)
    weights = random_weights(rng)
    head = {"lm_head.weight": weights.pop("lm_head.weight")}
    _write_model(folder / "model", "LlamaForCausalLM", weights | head, rope_theta)
    score = {"score.weight": rng.normal(0, 0.1, (1, HIDDEN)).astype(np.float32)}
    _write_model(folder / "reward", "LlamaForSequenceClassification", weights | score, rope_theta)

    def text(tokens: int) -> str:
        # a space in front, so that the words of a prompt and its response stay apart where they are joined as text
        return "".join(f" w{token}" for token in rng.integers(EOS + 1, VOCAB, tokens))

    rows = [{"prompt": text(LENGTH), "chosen": text(LENGTH - 1), "rejected": text(LENGTH - 1)} for _ in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    np.save(folder / "prompts.npy", rng.integers(EOS + 1, VOCAB, (16, SAMPLED_PROMPT)).astype(np.int32))


def random_weights(rng: np.random.Generator) -> dict[str, np.ndarray]:
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


def read_rows(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def _write_model(folder: Path, architecture: str, weights: dict[str, np.ndarray], rope_theta: float) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = [*SPECIAL.values(), *(f"w{token}" for token in range(EOS + 1, VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    write_model(folder, architecture, weights, tokenizer, rope_theta=rope_theta, positions=512)


def write_model(
    folder: Path,
    architecture: str,
    weights: dict[str, np.ndarray],
    tokenizer: Any,
    *,
    rope_theta: float,
    positions: int,
) -> None:
    """A Hugging Face folder of a Llama, with a tokenizer that has `SPECIAL` as its first ids."""
    from safetensors.numpy import save_file
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": [architecture], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": HEAD_DIM,
        "vocab_size": VOCAB, "max_position_embeddings": positions, "rms_norm_eps": 1e-5, "rope_theta": rope_theta,
        "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
        "dtype": "float32", "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip
    if "score.weight" in weights:
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)


class Channel:
    """Between a worker and the process that asks: `next` before each step, `done` after it.

    A worker is one side of one line. It answers with lines of JSON: to a number with the seconds and values of so many
    steps, to "reset" when its peak of memory counts anew, to "end" with its peaks.
    """

    def __init__(self) -> None:
        # libraries print to standard output too
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._left = 0
        self._seconds: list[float] = []
        self._values: list[float] = []
        self._whole = 0.0
        self._counts_anew = False
        self.about = ""
        """What the worker says of itself."""

    def ready(self, values: list[float]) -> None:
        """Says that the steps can begin, and what the two sides must agree on."""
        self._answer({"values": values, "about": self.about})

    def leave_out(self, reason: str) -> None:
        """Ends the process: this side cannot do the work."""
        self._answer({"left_out": reason})
        os._exit(0)

    def next(self) -> None:
        """Returns when a step is wanted; ends the process when none is wanted any more."""
        while not self._left:
            line = sys.stdin.readline().strip()
            if not line or line == "end":
                self._answer(self._peaks())
                os._exit(0)
            if line == "reset":
                self._reset()
                self._answer({})
            else:
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

    def _reset(self) -> None:
        # getrusage's peak starts anew with the kernel's, so that of compilation is kept here
        self._whole = _peak_mib()
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return
        self._counts_anew = True

    def _peaks(self) -> dict[str, float | None]:
        """MiB of resident memory: at most, and at most since the reset where the system can count anew."""
        last = _peak_mib()
        return {"whole": max(self._whole, last), "timed": last if self._counts_anew else None}

    def _answer(self, message: dict[str, Any]) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()


def _peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.is_file():
        fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines() if ":" in line)
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kibibytes, but bytes on macOS
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def versions(*names: str) -> str:
    return ", ".join(f"{name} {version(name)}" for name in names)


def matrices() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    a, b = rng.random((2, MATRIX, MATRIX), np.float32)
    return a, b


def mpo_jax_worker(work: str, folder: Path, channel: Channel) -> None:
    import jax

    channel.about = f"mpo_jax with {versions('jax', 'jaxlib')}"
    if work == "matmul":
        a, b = map(jax.numpy.asarray, matrices())
        multiply = jax.jit(jax.numpy.matmul)
        channel.ready([])
        channel.repeat(lambda: lambda: float(multiply(a, b).block_until_ready()[0, 0]))
    elif work.startswith("sample"):
        mpo_jax_sampling(WORK[work][1], folder, channel)
    elif work.startswith("ppo"):
        mpo_jax_ppo(work == "ppo_one_pass", folder, channel)
    else:
        mpo_jax_training(work, folder, channel)


def _bench_config(stage: str, folder: Path, *overrides: str) -> Any:
    from mpo_jax.config.load import load_config
    from mpo_jax.runtime import machine

    path = Path(__file__).resolve().parents[2] / "configs" / "bench" / f"{stage}.yaml"
    inputs = (f"model.path={folder / 'model'}", f"data.path={folder / 'rows.jsonl'}", f"workdir={folder}")
    config = load_config(path, (*inputs, "runtime.compilation_cache=null", *overrides), stage=stage)
    machine.start(config.runtime)
    return config


def mpo_jax_training(work: str, folder: Path, channel: Channel) -> None:
    """The stages' own jitted steps on the batches that their commands would take."""
    import jax

    from mpo_jax.data.batches import Buckets, TrainBatches, map_batches
    from mpo_jax.models import forward, loading
    from mpo_jax.runtime.sharding import make_mesh, place_batch
    from mpo_jax.stages import dpo, reward, sft
    from mpo_jax.stages.preference import PreferenceLoss
    from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
    from mpo_jax.training.update import init_state

    stage, size = work.removesuffix("_precomputed"), WORK[work][1]
    rows = ROWS if stage == "sft" else PAIRS
    config = _bench_config(stage, folder, f"train.batch_size={size}", f"data.max_rows={rows}")
    mesh, optim = make_mesh(config.mesh), getattr(config, stage).train.optim
    examples = _examples(config, stage)
    buckets = Buckets.of(examples, 1)
    batches = TrainBatches(examples, buckets, size, 0, shuffle=False)
    with jax.set_mesh(mesh):
        head = "value" if stage == "reward" else "lm"
        options = loading.Options.of(config.model)
        model, params = loading.load(folder / ("reward" if head == "value" else "model"), options, mesh, head=head)
        if stage == "sft":
            update = sft.make_step(model, optim, 1, mesh)
        elif stage == "reward":
            update = reward.make_step(model, optim, config.reward.loss, 1, mesh)
        else:
            update = dpo.make_step(model, optim, PreferenceLoss.of(config.dpo), config.dpo.nll_coef, 1, mesh)
        logps = forward.make_response_logps(model, mesh)
        known_EN = np.zeros((len(examples), 0), np.float32)
        if work == "dpo_precomputed":
            known_EN = map_batches(examples, buckets, size, partial(_placed, logps, params, mesh))
        # the state holds a copy, so that the reference stays as it is; elsewhere it is in nobody's memory
        state, k = init_state(params, make_optimizer(optim), mesh), 0
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
                    known_BN = place_batch(known, mesh) if reference is None else logps(reference, batch)
                    batch = dpo.DpoBatch(batch, known_BN)
                state = with_learning_rate(state, optim.learning_rate)
                state, metrics = jax.block_until_ready(update(state, batch, {}))
                return float(metrics["loss"].value)

            return timed

        channel.repeat(step)


def _placed(function: Any, params: Any, mesh: Any, rows: Any) -> Any:
    from mpo_jax.runtime.sharding import place_batch

    return function(params, place_batch(rows, mesh))


def _examples(config: Any, stage: str) -> list[Any]:
    """The stage's tokenized rows in file order."""
    from mpo_jax.data.corpus import base_tokenizer, load_corpus
    from mpo_jax.data.text import TextCodec
    from mpo_jax.data.tokens import tokenize

    corpus = load_corpus(config)
    rows = [(row.prompt, (row.chosen, row.rejected)) for row in corpus.pairs]
    if stage == "sft":
        rows = [(row.prompt, (row.response,)) for row in corpus.demonstrations]
    return tokenize(TextCodec(base_tokenizer(config), config.text), rows)[0]


def mpo_jax_ppo(one_pass: bool, folder: Path, channel: Channel) -> None:
    """The stage's own iterations, the reward model being the critic's start too."""
    import jax
    import jax.numpy as jnp

    from mpo_jax.data.batches import Buckets, TrainBatches, Widths, collate
    from mpo_jax.data.tokens import Example
    from mpo_jax.models import forward, loading
    from mpo_jax.pipeline.stages import stage_settings
    from mpo_jax.runtime.offload import Offload
    from mpo_jax.runtime.sharding import make_mesh, place_batch
    from mpo_jax.stages.ppo.iteration import Loop, Models, init_ppo_state
    from mpo_jax.stages.ppo.layout import packing_for

    lengths = (f"ppo.train.batch_size={ROLLOUTS}", f"text.max_response_tokens={LENGTH}")
    config = _bench_config("ppo", folder, f"ppo.one_pass={str(one_pass).lower()}", *lengths)
    mesh = make_mesh(config.mesh)
    rows = _examples(config, "sft")
    examples = [Example(row.prompt, ()) for row in rows]
    batches = TrainBatches(examples, Buckets.of(examples, 1), ROLLOUTS, 0, shuffle=False)
    allowed = jnp.ones(VOCAB, bool).at[jnp.asarray([PAD, UNK, EOS])].set(False)
    # a response never ends before its last token
    codec: Any = SimpleNamespace(ends=-1, allowed=lambda _: allowed)
    with jax.set_mesh(mesh):
        options = loading.Options.of(config.model)
        model, params = loading.load(folder / "model", options, mesh)
        judge, judge_params = loading.load(folder / "reward", options, mesh, head="value")
        fixed = place_batch(collate(rows[:ROLLOUTS], Widths.of(rows[:ROLLOUTS]), num_responses=1), mesh)
        scores = forward.make_score_pairs(judge, mesh)(judge_params, fixed)
        logps = forward.make_response_logps(model, mesh)(params, fixed)
        settings, offload = stage_settings("ppo", config), Offload.of(config.runtime, mesh)
        models = Models(model, judge, {}, {}, params, judge_params)
        packing, log_every = packing_for(settings, batches, mesh), config.ppo.train.log_every
        loop = Loop(settings, mesh, codec, models, offload, ROWS // ROLLOUTS, log_every, packing=packing)
        # each state holds a copy, so that reference and reward model stay as they are
        state = init_ppo_state(settings.method, params, judge_params, mesh, offload)
        params, judge_params, k = None, None, 0
        channel.ready([float(x) for x in (*np.ravel(scores), *np.ravel(logps))])

        def timed() -> float:
            nonlocal state, k
            state, metrics, _ = jax.block_until_ready(loop.iteration(state, batches[k], None))
            k += 1
            return float(metrics["objective/scores"].value)

        channel.repeat(lambda: timed)


def mpo_jax_sampling(batch_size: int, folder: Path, channel: Channel) -> None:
    import jax
    import jax.numpy as jnp

    from mpo_jax.data.batches import Widths, collate
    from mpo_jax.data.tokens import Example
    from mpo_jax.models import loading
    from mpo_jax.models.generate import Sampling, make_generate
    from mpo_jax.runtime.sharding import make_mesh, place_batch

    config = _bench_config("ppo", folder)
    mesh = make_mesh(config.mesh)
    examples = [Example(row, ()) for row in np.load(folder / "prompts.npy")[:batch_size]]
    with jax.set_mesh(mesh):
        model, params = loading.load(folder / "model", loading.Options.of(config.model), mesh)
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


@dataclasses.dataclass(frozen=True)
class Peer:
    """The library on the other side.

    Attributes:
      side: its short name.
      title: what it is called in the table.
      script: the file that a worker runs.
      works: the keys of WORK that it can do.
      worker: does one of them in a process of its own.
      rope_theta: of the model that both sides get.
    """

    side: str
    title: str
    script: str
    works: tuple[str, ...]
    worker: Callable[[str, Path, Channel], None]
    rope_theta: float = 10000.0


class Worker:
    """One side of one line, seen by the process that asks."""

    def __init__(self, python: str, script: str, side: str, work: str, folder: Path):
        threads = {f"{library}_NUM_THREADS": str(THREADS) for library in ("OMP", "MKL", "OPENBLAS")}
        caches = {"HF_HOME": str(folder / "hub"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._log = folder / f"{side}-{work}.log"
        self.name = f"{side} {work}"
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [python, script, "--worker", side, work, str(folder)],
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


class LeftOut(Exception):
    """A side cannot do the work, for the reason given."""


@contextmanager
def workers(peer: Peer, python: str, work: str, folder: Path) -> Iterator[list[Worker]]:
    started: list[Worker] = []
    try:
        started.append(Worker(sys.executable, peer.script, "mpo_jax", work, folder))
        started.append(Worker(python, peer.script, peer.side, work, folder))
        yield started
    finally:
        for worker in started:
            worker.stop()


def measure(peer: Peer, python: str, work: str, folder: Path, rounds: int) -> tuple[dict[str, Any], list[str]]:
    """A line of the table, and what each side says of itself.

    Exits where the sides do not compute the same.

    Raises:
      LeftOut: where a side cannot do this work.
    """
    _, batch_size, steps, unit = WORK[work]
    drawn = work.startswith("ppo")
    with workers(peer, python, work, folder) as sides:
        ready = [side.answer() for side in sides]
        for answer in ready:
            if "left_out" in answer:
                raise LeftOut(answer["left_out"])
        warm = [side.ask(WARM_STEPS) for side in sides]
        # rollouts are drawn, and no two libraries draw the same
        values = [r["values"] + ([] if drawn else w["values"]) for r, w in zip(ready, warm, strict=True)]
        ours, theirs = map(np.asarray, values)
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=TOLERANCE, atol=0):
            sys.exit(f"{work}: the sides do not agree, so their times mean nothing\n{ours}\n{theirs}")
        for side in sides:
            side.ask("reset")
        taken: list[list[float]] = [[], []]
        for _ in range(rounds):
            for side, seconds in zip(sides, taken, strict=True):
                seconds += side.ask(steps)["seconds"]
        peaks = [side.ask("end") for side in sides]
    done = {"s": None, "tokens/s": batch_size * LENGTH, "GFLOP/s": 2 * MATRIX**3 / 1e9}[unit]
    values = [np.quantile(np.asarray(s) if done is None else done / np.asarray(s), (0.5, 0, 1)) for s in taken]
    speed = np.median(taken[1]) / np.median(taken[0])
    # greedy tokens and scores of fixed rows are compared, but say nothing as a number
    last = "" if drawn or unit != "s" else f"{ours[-1]:.6f} / {theirs[-1]:.6f}"
    row = {"unit": unit, "values": values, "speed": speed, "peaks": peaks, "loss": last}
    return row, [r["about"] for r in ready]


def table(title: str, rows: dict[str, dict[str, Any]]) -> str:
    lines = [
        f"| work | unit | mpo_jax (min to max) | {title} (min to max) | times as fast "
        "| peak MiB, ours / theirs | peak MiB while timed, ours / theirs | loss at step 3, ours / theirs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for work, row in rows.items():
        digits = 3 if row["unit"] == "s" else 0
        ours, theirs = ("{:.{d}f} ({:.{d}f} to {:.{d}f})".format(*v, d=digits) for v in row["values"])
        whole, timed = (
            " / ".join("-" if peak[kind] is None else f"{peak[kind]:.0f}" for peak in row["peaks"])
            for kind in ("whole", "timed")
        )
        lines.append(
            f"| {WORK[work][0]} | {row['unit']} | {ours} | {theirs} | {row['speed']:.2f} | {whole} | {timed} "
            f"| {row['loss']} |"
        )
    return "\n".join(lines)


def processor() -> dict[str, str]:
    """What Linux says of the last of its processors; nothing elsewhere."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def machine() -> str:
    name = processor().get("model name", platform.processor() or platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable, {THREADS} threads a side"


def benchmark(peer: Peer, description: str | None) -> None:
    """The command line of a benchmark against `peer`; also what its workers run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(peer.works), help=f"comma-separated, of {', '.join(peer.works)}")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument(
        f"--{peer.side}-python", dest="python", default=sys.executable, metavar="PATH",
        help=f"the interpreter of {peer.title}'s environment (default: this one)",
    )  # fmt: skip
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        side, work, folder = given.worker
        # before JAX and torch start, which count the cores that they may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
        (mpo_jax_worker if side == "mpo_jax" else peer.worker)(work, Path(folder), Channel())
        return
    names = [name.strip() for name in given.only.split(",") if name.strip()]
    if unknown := set(names) - set(peer.works):
        parser.error(f"--only knows {', '.join(peer.works)}, not {', '.join(sorted(unknown))}")
    for name in names:
        _, batch_size, steps, unit = WORK[name]
        most = {"sft": ROWS, "ppo": ROWS, "ppo_one_pass": ROWS}.get(name, PAIRS) // batch_size
        if unit == "s" and WARM_STEPS + given.rounds * steps > most:
            parser.error(f"--rounds {given.rounds}: there are rows for {most} steps of {name} only")
    begin, rows, about, missing = time.perf_counter(), {}, [], []
    with tempfile.TemporaryDirectory() as scratch:
        write_inputs(Path(scratch), peer.rope_theta)
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            try:
                rows[name], said = measure(peer, given.python, name, Path(scratch), given.rounds)
            except LeftOut as reason:
                missing.append(f"{name} is left out: {reason}")
                continue
            about += said
    print("\n".join(dict.fromkeys((machine(), *about))))
    print(f"{given.rounds} turns, {time.perf_counter() - begin:.0f} s in all\n")
    if rows:
        print(table(peer.title, rows))
    if missing:
        print("\n" + "\n".join(missing))
