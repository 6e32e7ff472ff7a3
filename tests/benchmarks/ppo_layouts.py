"""Times PPO on packed samples, on padded ones in the columns that real rows reach, and in all that they may have.

    .venv/bin/python tests/benchmarks/ppo_layouts.py --model models/stories260K \
        --data hh-rlhf/helpful-base.test.jsonl.gz --data hh-rlhf/harmless-base.test.jsonl.gz

Scoring and both updates on a random model of 8.3M parameters, with the chosen responses as rollouts: an untrained
policy's own lengths would mean nothing. Then whole iterations with sampling, where the policy is `--model`.

The sides take turns on the same batches in one process. Prints the columns, and the minimum of the rounds, also in
processor time, which other programs on the machine disturb less.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from mpo_jax.config.load import load_config
from mpo_jax.data.batches import Batch, Buckets, TrainBatches
from mpo_jax.data.corpus import load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, tokenize
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.pipeline.stages import stage_settings
from mpo_jax.runtime import machine
from mpo_jax.runtime.offload import Offload
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.runtime.timing import seconds
from mpo_jax.stages.ppo.iteration import Loop, Models, init_ppo_state
from mpo_jax.stages.ppo.layout import Samples, make_lay_out, packing_for
from mpo_jax.stages.widths import few_widths
from mpo_jax.tools.bench.speed import SIZES
from mpo_jax.types import Params, PromptBatch, trainable

Side: TypeAlias = Callable[[Batch], Any]


class Comparison:
    """The rows and settings that all sides share."""

    def __init__(self, given: argparse.Namespace, lengths: Sequence[int]):
        self.config = load_config(None, (
            "data.kind=hh", f"data.path=[{', '.join(given.data)}]", f"model.path={given.model}",
            f"text.max_prompt_tokens={lengths[0]}", f"text.max_response_tokens={lengths[1]}",
            f"ppo.train.batch_size={given.batch}", "model.remat=dots",
        ))  # fmt: skip
        machine.start(self.config.runtime)
        self.mesh = make_mesh(self.config.mesh)
        self.codec = TextCodec(load_tokenizer(given.model), self.config.text)
        corpus = load_corpus(self.config)
        rows = [(row.prompt, (row.chosen,)) for row in corpus.pairs]
        self.answered: list[Example] = tokenize(self.codec, rows)[0]

    def batches(self, size: int) -> TrainBatches:
        """Prompts with their chosen responses, in all the columns that a response may have."""
        text = self.config.text
        buckets = Buckets.of(self.answered, text.length_buckets, response=text.max_response_tokens)
        return TrainBatches(self.answered, buckets, size, 0)

    def loop(self, model: Model, params: Params, critic: Params) -> Loop:
        settings, codec = stage_settings("ppo", self.config), self.codec
        shown: Any = SimpleNamespace(ends=codec.ends, allowed=codec.allowed)
        prompts = [Example(row.prompt, ()) for row in self.answered]
        batches = TrainBatches(prompts, Buckets.of(prompts, 1), settings.train.batch_size, 0)
        models = Models(model, model, {}, {}, params, critic)
        packing = packing_for(settings, batches, self.mesh)
        return Loop(
            settings, self.mesh, shown, models, Offload(False, False), iterations=8, log_every=100, packing=packing
        )

    def columns(self, size: int) -> tuple[float, float]:
        """Mean columns of a batch's rows, prompt and response, at full width and at the fewest."""
        batches, found = self.batches(size), []
        for k in range(len(self.answered) // size):
            rows = batches[k].rows
            prompt, room = rows.prompt.shape[1], rows.response.shape[2]
            longest = rows.response_len.max()
            found.append((prompt + room, prompt + next(width for width in few_widths(room) if width >= longest)))
        whole, fewest = np.mean(found, 0)
        return float(whole), float(fewest)


def times(sides: dict[str, Side], batches: list[Batch], rounds: int) -> dict[str, tuple[float, float]]:
    """Seconds and processor seconds of each side, summed over the batches' fastest rounds; the first one compiles."""
    taken: dict[str, list[list[tuple[float, float]]]] = {name: [[] for _ in batches] for name in sides}
    for _ in range(rounds + 1):
        for k, batch in enumerate(batches):
            for name, side in sides.items():
                before = time.process_time()
                whole = seconds(lambda side=side, batch=batch: side(batch))
                taken[name][k].append((whole, time.process_time() - before))
    fastest = {name: np.sum([np.min(each[1:], 0) for each in found], 0) for name, found in taken.items()}
    return {name: (float(whole), float(busy)) for name, (whole, busy) in fastest.items()}


def sides_of(loop: Loop, start: Callable[[], Any]) -> dict[str, Side]:
    """An iteration on packed samples, on the fewest and on all columns; each has a state of its own."""

    def side(lay_out: Callable[[PromptBatch], Samples]) -> Side:
        state = [start()]

        def run(batch: Batch) -> Any:
            loop.lay_out = lay_out
            state[0], metrics, _ = loop.iteration(state[0], batch, None)
            return jax.block_until_ready(metrics)

        return run

    fewest = make_lay_out(loop.settings.method, None, loop.mesh)
    return {"packed": side(loop.lay_out), "fewest": side(fewest), "all": side(Samples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face folder: tokenizer, and policy that samples")
    parser.add_argument("--data", required=True, action="append", help="HH-RLHF file")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()

    shared = Comparison(given, (512, 512))
    for size in sorted({given.batch, 64}):
        whole, fewest = shared.columns(size)
        print(f"batches of {size}: {whole:.0f} columns become {fewest:.0f} ({fewest / whole:.2f})", flush=True)
    decoder = DecoderConfig(vocab_size=len(shared.codec.tokenizer), max_positions=1024, **SIZES)
    model = Model(decoder, remat="dots")
    params = trainable(jax.jit(forward.init_params, static_argnums=0)(decoder, jax.random.key(0)))
    critic = loading.with_value_head(model, params, shared.mesh)

    def compare(name: str, loop: Loop) -> None:
        start = lambda: init_ppo_state(loop.settings.method, *pair, shared.mesh, loop.offload)  # noqa: E731
        pair = loop.models.reference, loop.models.reward
        ordered = shared.batches(given.batch)
        found = times(sides_of(loop, start), [ordered[k] for k in range(given.batches)], given.rounds)
        for number, what in enumerate(("seconds", "processor seconds")):
            whole, fewest, packed = (found[side][number] for side in ("all", "fewest", "packed"))
            print(
                f"{name}: {whole:.2f} {what} in all columns, {fewest:.2f} ({fewest / whole:.2f}) in the fewest, "
                f"{packed:.2f} packed ({packed / whole:.2f}, {packed / fewest:.2f} of the fewest)",
                flush=True,
            )

    with jax.set_mesh(shared.mesh):
        loop = shared.loop(model, params, critic)
        loop.generate = lambda _, answered, *rest: (answered, jnp.ones((given.batch, 1), bool))
        compare("score, critic and actor, chosen responses", loop)
    shared = Comparison(given, (256, 256))
    with jax.set_mesh(shared.mesh):
        model, params = loading.load(given.model, loading.Options.of(shared.config.model), shared.mesh)
        critic = loading.with_value_head(model, params, shared.mesh)
        compare("iterations with sampling, 256 + 256", shared.loop(model, params, critic))


if __name__ == "__main__":
    main()
