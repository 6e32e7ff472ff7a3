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
from mpo_jax.runtime.sharding import make_mesh, place_batch, replicated
from mpo_jax.runtime.timing import seconds
from mpo_jax.stages import dpo, reward
from mpo_jax.tools.bench.speed import SIZES
from mpo_jax.training.loop import init_state, make_update, state_sharding
from mpo_jax.training.refill import sample_all
from mpo_jax.types import Mean, PromptBatch

RATE = np.float32(1e-5)


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


def padded_dpo(
    model: Model, params: Any, batch: tuple[PromptBatch, jax.Array]
) -> tuple[dict[str, Mean], dict[str, Any]]:
    joined, reference = batch
    logp = forward.response_logps(model, params, two_rows(joined)).reshape(-1, 2)
    loss = dpo.DpoLoss("dpo", 0.1, 0.0, False, 0.0)
    return {"loss": loss.preference(logp[:, 0] - logp[:, 1], reference[:, 0] - reference[:, 1])}, {}


def padded_reward(model: Model, params: Any, joined: PromptBatch) -> tuple[dict[str, Mean], dict[str, Any]]:
    rows = two_rows(joined)
    score = forward.response_scores(forward.scores(model, params, forward.join(rows)), rows).reshape(-1, 2)
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
        self.params = jax.jit(forward.init_params, static_argnums=0)(decoder, jax.random.key(0))
        self.batch, self.rows, self.mean_length = given.batch, given.rows, given.mean_length
        corpus = load_corpus(self.config)
        pairs = [(row.prompt, (row.chosen, row.rejected)) for row in corpus.pairs[: given.rows]]
        self.pairs, _ = tokenize(self.codec, pairs)
        self.prompts, _ = tokenize(self.codec, [(prompt, ()) for prompt in corpus.prompts[: given.rows]])

    def updates(self, name: str) -> tuple[Callable[[], float], Callable[[], float]]:
        """A pass of updates over all pairs, ours and padded; each returns its loss at the first step."""
        optim, head = self.config.dpo.train.optim, "value" if name == "reward" else "lm"
        params = forward.with_score_head(self.params, self.ours.decoder) if head == "value" else self.params
        if head == "value":
            ours = reward.make_step(self.ours, optim, "last_token", 1, self.mesh)
        else:
            ours = dpo.make_step(self.ours, optim, dpo.DpoLoss("dpo", 0.1, 0.0, False, 0.0), 1, self.mesh)
        plain = jax.jit(
            make_update(partial(padded_reward if head == "value" else padded_dpo, self.plain), optim, accumulation=1),
            donate_argnums=0,
            out_shardings=(state_sharding(self.plain, optim, self.mesh, head=head), replicated(self.mesh)),
        )
        reference = jnp.zeros((self.batch, 2))

        def make_pass(step: Any, buckets: int) -> Callable[[], float]:
            batches = TrainBatches(self.pairs, Buckets.of(self.pairs, buckets), self.batch, 0)
            count = len(self.pairs) // self.batch
            state = [init_state(params, optim, self.mesh)]

            def run() -> float:
                loss = 0.0
                for k in range(count):
                    rows = place_batch(batches[k].rows, self.mesh)
                    state[0], metrics = step(state[0], rows if head == "value" else (rows, reference), RATE)
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
                self.ours, self.params, self.prompts, sampling=sampling, eos_id=self.codec.eos_id,
                allowed_V=allowed_V, key=key, buckets=buckets, batch_size=self.batch, mesh=self.mesh,
            )  # fmt: skip
            return found.ids, found.length

        def one(batch: PromptBatch) -> Any:
            placed = place_batch(batch, self.mesh)
            joined, _ = generate(self.params, placed, key, jnp.zeros_like(placed.key), allowed_V)
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
