"""Times what bucketing, shared prompts and refilled rows save on real rows: the same model, once without them.

    .venv/bin/python tests/benchmarks/against_padding.py --tokenizer models/stories260K \
        --data hh-rlhf/helpful-base.test.jsonl.gz --data hh-rlhf/harmless-base.test.jsonl.gz

Needs no other framework. Updates of the reward model and of DPO: prompt shared and padded to a few widths, as the
stages do it, against two rows a pair, all padded to the longest row, with XLA's attention. Sampling: two samples a
prompt with rows refilled, against batches that wait for their longest sample. The model is random, 8.3M parameters; it
may draw EOS and so many other ids that a token ends its response with a probability of 1 / `--mean-length`.

The two sides take turns, a whole pass over the same rows each. Prints a Markdown table of medians.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat

from mpo_jax.config.load import load_config
from mpo_jax.data.batches import Buckets, TrainBatches, map_batches
from mpo_jax.data.corpus import load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, tokenize
from mpo_jax.losses import bradley_terry_loss
from mpo_jax.models import forward
from mpo_jax.models.forward import Model
from mpo_jax.models.generate import Sampling, make_generate
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.runtime import machine
from mpo_jax.runtime.sharding import make_mesh, place_batch
from mpo_jax.runtime.timing import seconds
from mpo_jax.stages import dpo, reward
from mpo_jax.stages.preference import Pairs, PreferenceLoss
from mpo_jax.tools.bench.speed import SIZES
from mpo_jax.training.optimizer import make_optimizer, with_learning_rate
from mpo_jax.training.refill import sample_all
from mpo_jax.training.update import init_state, jit_update
from mpo_jax.types import Mean, PromptBatch, Tree, frozen, trainable

RATE = 1e-5
LOSS = PreferenceLoss(name="dpo", beta=0.1)


def two_rows(joined: PromptBatch) -> PromptBatch:
    """Each pair as two rows [2B] that repeat the prompt."""
    twice = lambda x: repeat(x, "b ... -> (b n) ...", n=2)  # noqa: E731
    return PromptBatch(
        twice(joined.prompt),
        twice(joined.prompt_len),
        rearrange(joined.response, "b n s -> (b n) 1 s"),
        rearrange(joined.response_len, "b n -> (b n) 1"),
        twice(joined.key),
    )


def padded_dpo(model: Model, tree: Tree, batch: dpo.DpoBatch) -> tuple[dict[str, Mean], dict[str, Any]]:
    rows = batch.pairs
    logp = forward.response_logps(model, tree, two_rows(rows)).reshape(-1, 2)
    pairs = Pairs(logp, jnp.asarray(batch.ref_logp), jnp.asarray(rows.response_len), jnp.asarray(rows.prompt_len) > 0)
    return {"loss": LOSS.value(pairs)}, {}


def padded_reward(model: Model, tree: Tree, joined: PromptBatch) -> tuple[dict[str, Mean], dict[str, Any]]:
    rows = two_rows(joined)
    score = forward.response_scores(forward.scores(model, tree, forward.join(rows)), rows).reshape(-1, 2)
    return {"loss": bradley_terry_loss(score[:, 0], score[:, 1])}, {}


class Comparison:
    """The inputs that both sides share."""

    def __init__(self, given: argparse.Namespace):
        data = f"data.path=[{', '.join(given.data)}]"
        sizes = (f"text.max_prompt_tokens={given.lengths[0]}", f"text.max_response_tokens={given.lengths[1]}")
        self.config = load_config(None, ("data.kind=hh", data, f"model.path={given.tokenizer}", *sizes))
        machine.start(self.config.runtime)
        self.mesh = make_mesh(self.config.mesh)
        self.codec = TextCodec(load_tokenizer(given.tokenizer), self.config.text)
        vocab = len(self.codec.tokenizer)
        decoder = DecoderConfig(vocab_size=vocab, max_positions=2 * sum(given.lengths), **SIZES)
        self.ours, self.plain = Model(decoder, remat="dots"), Model(decoder, remat="dots", attention="xla")
        self.tree = jax.jit(forward.init_params, static_argnums=0)(decoder, jax.random.key(0))
        self.batch, self.rows, self.mean_length = given.batch, given.rows, given.mean_length
        corpus = load_corpus(self.config)
        pairs = [(row.prompt, (row.chosen, row.rejected)) for row in corpus.pairs[: given.rows]]
        self.pairs, _ = tokenize(self.codec, pairs)
        self.prompts, _ = tokenize(self.codec, [(prompt, ()) for prompt in corpus.prompts[: given.rows]])

    def updates(self, name: str) -> tuple[Callable[[], float], Callable[[], float]]:
        """A pass of updates over all pairs, ours and padded; each returns its loss at the first step."""
        optim, is_reward = self.config.dpo.train.optim, name == "reward"
        tree = forward.with_score_head(self.tree, self.ours.decoder) if is_reward else self.tree
        if is_reward:
            ours = reward.make_step(self.ours, optim, "last_token", 1, self.mesh)
        else:
            ours = dpo.make_step(self.ours, optim, LOSS, 0.0, 1, self.mesh)
        padded = partial(padded_reward if is_reward else padded_dpo, self.plain)
        plain = jit_update(padded, make_optimizer(optim), tree, self.mesh)
        reference = np.zeros((self.batch, 2), np.float32)

        def make_pass(step: Any, buckets: int) -> Callable[[], float]:
            batches = TrainBatches(self.pairs, Buckets.of(self.pairs, buckets), self.batch, 0)
            count = len(self.pairs) // self.batch
            state = [init_state(trainable(tree), make_optimizer(optim), self.mesh)]

            def run() -> float:
                loss = 0.0
                for k in range(count):
                    rows = batches[k].rows
                    data = place_batch(rows if is_reward else dpo.DpoBatch(rows, reference), self.mesh)
                    state[0], metrics = step(with_learning_rate(state[0], RATE), data, {})
                    loss += float(metrics["loss"].value)
                return loss / count

            return run

        return make_pass(ours, self.config.text.length_buckets), make_pass(plain, 1)

    def sampling(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Two samples of every prompt, rows refilled and in fixed batches; each returns ids and lengths."""
        sampling = Sampling(self.config.text.max_response_tokens, num_samples=2)
        vocab = self.ours.decoder.vocab_size
        allowed_V = (jnp.arange(vocab) < self.mean_length - 1).at[self.codec.eos_id].set(True)
        key, buckets = jax.random.key(0), Buckets.of(self.prompts, self.config.text.length_buckets)
        generate = make_generate(self.ours, sampling, self.codec.eos_id, self.mesh)

        def refilled() -> Any:
            found = sample_all(
                self.ours, frozen(self.tree), self.prompts, sampling=sampling, eos_id=self.codec.eos_id,
                allowed_V=allowed_V, key=key, buckets=buckets, batch_size=self.batch, mesh=self.mesh,
            )  # fmt: skip
            return found.ids, found.length

        def one(batch: PromptBatch) -> Any:
            placed = place_batch(batch, self.mesh)
            joined, _ = generate(frozen(self.tree), placed, key, jnp.zeros_like(placed.key), allowed_V)
            return joined.response, joined.response_len

        return refilled, lambda: map_batches(self.prompts, buckets, self.batch, one)


def turns(sides: tuple[Callable[[], Any], Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of each side over the rounds, after one that compiles."""
    taken: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for side, times in zip(sides, taken, strict=True):
            each = seconds(side)
            if number:
                times.append(each)
    return [statistics.median(times) for times in taken]


def lengths(examples: list[Example]) -> str:
    prompt = [len(example.prompt) for example in examples]
    response = [len(ids) for example in examples for ids in example.responses]
    shown = [np.percentile(x, (50, 90, 100)).astype(int).tolist() for x in (prompt, response) if x]
    return ", responses ".join(f"p50 {a}, p90 {b}, longest {c}" for a, b, c in shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, action="append", help="HH-RLHF file")
    parser.add_argument("--lengths", type=int, nargs=2, default=(512, 256), help="tokens of prompt and response")
    parser.add_argument("--rows", type=int, default=64, help="pairs, and prompts to sample for")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--mean-length", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", nargs="*", default=("reward", "dpo"), help="of which stages, besides sampling")
    given = parser.parse_args()
    shared = Comparison(given)
    print(f"{len(shared.pairs)} pairs, prompts {lengths(shared.pairs)}\n")
    print("| work | ours, s | padded or fixed, s | times as fast |\n|---|---|---|---|")
    with jax.set_mesh(shared.mesh):
        for name in given.updates:
            ours, plain = turns(shared.updates(name), given.rounds)
            print(f"| {name}, a pass over the pairs | {ours:.2f} | {plain:.2f} | {plain / ours:.2f} |", flush=True)
        sides = shared.sampling()
        for found, wanted in zip(sides[0](), sides[1](), strict=True):
            np.testing.assert_array_equal(found, wanted, "both sides draw the same samples")
        drawn = sides[0]()[1]
        ours, plain = turns(sides, given.rounds)
        shown = f"mean {drawn.mean():.0f}, longest {drawn.max()}"
        print(f"| sampling, two a prompt, {shown} tokens | {ours:.2f} | {plain:.2f} | {plain / ours:.2f} |")


if __name__ == "__main__":
    main()
