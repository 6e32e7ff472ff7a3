"""Times an epoch of training on packed rows against the same batches padded to a few widths, on real rows.

    .venv/bin/python tests/benchmarks/packed_rows.py --tokenizer models/SmolLM2-135M-Instruct.Q4_1.gguf \
        --data hh-rlhf/helpful-base.test.jsonl.gz

DPO's and the reward model's updates over the first pairs, in the stages' own steps, order and shapes, and the pass that
scores the pairs under DPO's reference. The model is random, 6M parameters besides embeddings. Ids are taken modulo
`--vocab`: with 4096 the head has about the share of the work that it has in SmolLM2-135M. The sides take turns, a whole
pass over the same batches each; a first round compiles, and its time is in the table too.

Prints a Markdown table: medians of the rounds, the share of columns with tokens, and the largest difference of the
losses of the first round, whose states are the same.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from mpo_jax.config.load import load_config
from mpo_jax.data.batches import Buckets, TrainBatches
from mpo_jax.data.corpus import load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, tokenize
from mpo_jax.evaluation.scoring import score_examples
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.runtime import machine
from mpo_jax.runtime.sharding import make_mesh, place_batch
from mpo_jax.runtime.timing import seconds
from mpo_jax.stages import dpo, reward
from mpo_jax.stages.packed import packing_in_order, packing_of
from mpo_jax.stages.preference import PreferenceLoss
from mpo_jax.stages.settings import TrainSettings
from mpo_jax.tools.bench.speed import SIZES
from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
from mpo_jax.training.update import init_state
from mpo_jax.types import Packed, frozen, trainable

RATE = 1e-5
LOSS = PreferenceLoss(name="dpo", beta=0.1)


class Side(NamedTuple):
    """One layout of one kind of work: a whole pass, which returns its losses or scores; and its columns in all."""

    run: Callable[[], np.ndarray]
    columns: int


class Comparison:
    """The inputs that both sides share."""

    def __init__(self, given: argparse.Namespace):
        sizes = (f"text.max_prompt_tokens={given.lengths[0]}", f"text.max_response_tokens={given.lengths[1]}")
        self.config = load_config(None, (
            "data.kind=hh", f"data.path={given.data}", f"model.path={given.tokenizer}", *sizes,
            f"dpo.train.batch_size={given.batch}",
        ))  # fmt: skip
        machine.start(self.config.runtime)
        self.mesh = make_mesh(self.config.mesh)
        tokenizer = load_tokenizer(given.tokenizer)
        decoder = DecoderConfig(vocab_size=given.vocab, max_positions=2 * sum(given.lengths), **SIZES)
        self.model = Model(decoder, remat="dots")
        self.tree = jax.jit(forward.init_params, static_argnums=0)(decoder, jax.random.key(0))
        rows = [(row.prompt, (row.chosen, row.rejected)) for row in load_corpus(self.config).pairs[: given.rows]]
        real = tokenize(TextCodec(tokenizer, self.config.text), rows)[0]
        self.examples = [Example(e.prompt % given.vocab, [ids % given.vocab for ids in e.responses]) for e in real]
        self.train = TrainSettings.of(self.config.dpo.train)
        self.buckets = Buckets.of(self.examples, self.config.text.length_buckets)
        self.tokens = sum(len(e.prompt) + sum(map(len, e.responses)) for e in self.examples)

    def updates(self, name: str, *, packed: bool) -> Side:
        """A pass of updates over all pairs."""
        optim, is_reward, size = self.train.optim, name == "reward", self.train.batch_size
        tree = forward.with_score_head(self.tree, self.model.decoder) if is_reward else self.tree
        if is_reward:
            step = reward.make_step(self.model, optim, "last_token", 1, self.mesh)
        else:
            step = dpo.make_step(self.model, optim, LOSS, 0.0, 1, self.mesh)
        batches = TrainBatches(self.examples, self.buckets, size, 0)
        if packed:
            batches = dataclasses.replace(batches, packing=packing_of(batches, self.train, self.mesh))
        count, reference = len(self.examples) // size, np.zeros((size, 2), np.float32)
        state = [init_state(trainable(tree), make_optimizer(optim), self.mesh)]

        def run() -> np.ndarray:
            losses = []
            for k in range(count):
                rows = batches[k].rows
                data = place_batch(rows if is_reward else dpo.DpoBatch(rows, reference), self.mesh)
                state[0], metrics = step(with_learning_rate(state[0], RATE), data, {})
                losses.append(metrics["loss"])
            return np.asarray([float(loss.value) for loss in losses])

        return Side(run, sum(columns(batches[k].rows) for k in range(count)))

    def reference(self, *, packed: bool) -> Side:
        """Log-probabilities of all pairs."""
        packing = packing_in_order(self.examples, self.train, self.mesh) if packed else None

        def run() -> np.ndarray:
            return score_examples(
                self.model, frozen(self.tree), self.examples, head="lm", batch_size=self.train.batch_size,
                length_buckets=self.config.text.length_buckets, mesh=self.mesh, packing=packing,
            )  # fmt: skip

        return Side(run, 0)


def columns(rows: Any) -> int:
    """Columns that a batch's forward pass reads."""
    if isinstance(rows, Packed):
        return int(rows.count) * rows.ids[0].size
    return rows.prompt.size + rows.response.size


def compare(name: str, packed: Side, padded: Side, shared: Comparison, rounds: int) -> str:
    sides, taken = (packed, padded), ([], [])
    found: list[np.ndarray] = []
    first = [seconds(lambda side=side: found.append(side.run())) for side in sides]
    for _ in range(rounds):
        for side, times in zip(sides, taken, strict=True):
            times.append(seconds(side.run))
    ours, theirs = (statistics.median(times) for times in taken)
    share = " / ".join(f"{shared.tokens / side.columns:.0%}" if side.columns else "-" for side in sides)
    apart = np.abs(found[0] - found[1]).max()
    shown = f"{ours:.2f} | {theirs:.2f} | {theirs / ours:.2f} | {first[0]:.1f} / {first[1]:.1f}"
    return f"| {name} | {shown} | {share} | {apart:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder or GGUF file")
    parser.add_argument("--data", required=True, help="HH-RLHF file")
    parser.add_argument("--lengths", type=int, nargs=2, default=(512, 256), help="tokens of prompt and response")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", nargs="*", default=("dpo", "reward", "reference"))
    given = parser.parse_args()
    shared = Comparison(given)
    print(f"{len(shared.examples)} pairs, {shared.tokens} tokens, batches of {given.batch}\n")
    print("| work | packed, s | padded, s | times as fast | first pass, s | columns with tokens | apart |")
    print("|---|---|---|---|---|---|---|")
    with jax.set_mesh(shared.mesh):
        for name in given.work:
            make = shared.reference if name == "reference" else lambda packed, n=name: shared.updates(n, packed=packed)
            print(compare(name, make(packed=True), make(packed=False), shared, given.rounds), flush=True)


if __name__ == "__main__":
    main()
