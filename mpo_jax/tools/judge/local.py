"""Judges on this machine: a language model that gets the same prompt, or a reward model."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mpo_jax.config.schema import Config
from mpo_jax.data.chat import Chat
from mpo_jax.data.records import Renderer, user_turn
from mpo_jax.data.sources import fingerprint_files
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import tokenize
from mpo_jax.evaluation.answers import Pair
from mpo_jax.evaluation.sampling import sample_texts
from mpo_jax.evaluation.scoring import score_examples
from mpo_jax.models import loading
from mpo_jax.models.generate import Sampling
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.tools.judge.cache import content_key
from mpo_jax.tools.judge.calls import Call, Done, Failure, Reply

BATCHES = 4
"""Batches of answers between two writes to disk: enough to refill rows that end early."""


@dataclasses.dataclass(frozen=True)
class LocalJudge:
    """A language model that answers greedily.

    Attributes:
      chat: whether prompts go through its chat template.
    """

    path: Path
    config: Config
    codec: TextCodec
    mesh: Mesh
    chat: bool

    @property
    def max_tokens(self) -> int | None:
        return self.config.text.max_response_tokens

    @cached_property
    def _fingerprint(self) -> str:
        files = [self.path] if self.path.is_file() else sorted(p for p in self.path.iterdir() if p.is_file())
        return fingerprint_files(files, self.config.runtime.fingerprint_cache_folder)

    def key(self, prompt: str) -> str:
        return content_key("local", self._fingerprint, str(self.max_tokens), self.codec.templated(self._render(prompt)))

    def count_tokens(self, calls: Sequence[Call]) -> tuple[int, str]:
        fitted = self.codec.prompts([self._render(call.prompt) for call in calls])
        return sum(prompt.full for prompt in fitted), "counted by the judge's own tokenizer"

    def ask(self, calls: Sequence[Call], done: Done) -> None:
        texts = [self._render(call.prompt) for call in calls]
        fitting = []
        for call, text, fitted in zip(calls, texts, self.codec.prompts(texts), strict=True):
            if fitted.truncated:
                room = self.config.text.max_prompt_tokens
                done(call, Failure(f"the prompt has {fitted.full} tokens, and the model has room for {room}"))
            else:
                fitting.append((call, text))
        if not fitting:
            return
        with jax.set_mesh(self.mesh):
            options, limits = loading.Options.of(self.config.model), self.config.text
            ids = self.codec.vocab_size
            model, params = loading.load(self.path, options, self.mesh, text=limits, frozen=True, num_ids=ids)
            size = BATCHES * self.config.evaluate.batch_size
            for begin in range(0, len(fitting), size):
                part = fitting[begin : begin + size]
                found, _ = sample_texts(
                    model, params, self.codec, [text for _, text in part],
                    sampling=Sampling(limits.max_response_tokens, greedy=True),
                    key=stage_key(self.config.seed, "judge"), batch_size=self.config.evaluate.batch_size,
                    mesh=self.mesh, cache=self.config.runtime.token_cache_folder, name=str(self.path),
                )  # fmt: skip
                for (call, _), answer in zip(part, found, strict=True):
                    done(call, Reply(answer))

    def _render(self, prompt: str) -> str:
        return self._chat.prompt(user_turn(prompt)) if self.chat else prompt

    @cached_property
    def _chat(self) -> Chat:
        return Chat.of(self.codec.tokenizer, self.config.text)


def reward_totals(
    path: Path,
    config: Config,
    codec: TextCodec,
    mesh: Mesh,
    pairs: Sequence[Pair],
    *,
    render: Renderer,
    progress: Callable[[int], None],
) -> tuple[np.ndarray, dict[str, Any]]:
    """[pairs, 2] a reward model's raw scores of A's and B's responses, and a report of what was cut to fit.

    Prompts are those that the policies saw; if they are not known, `render` and the model's own template make them.

    Args:
      progress: called with the number of pairs scored so far.
    """
    rows: list[tuple[str, tuple[str, ...]]] = []
    for number, pair in enumerate(pairs, 1):
        if pair.shown is not None:
            rows.append((pair.shown, (pair.a, pair.b)))
            continue
        prompt, replies = render.render(pair.prompt, (pair.a, pair.b), f"prompt {number}")
        rows.append((codec.templated(prompt), tuple(replies)))
    codec = TextCodec(codec.tokenizer, config.text.model_copy(update={"prompt_template": "{prompt}"}))
    examples, report = tokenize(codec, rows, cache=config.runtime.token_cache_folder)
    with jax.set_mesh(mesh):
        model, params = loading.load(
            path, loading.Options.of(config.model), mesh, text=config.text, head="value", frozen=True,
            num_ids=codec.vocab_size, label=config.reward.label,
        )  # fmt: skip
        scores = score_examples(
            model, params, examples, head="value", batch_size=config.evaluate.batch_size,
            length_buckets=config.text.length_buckets, mesh=mesh, name=str(path),
            progress=lambda done, _: progress(done),
        )  # fmt: skip
    return np.asarray(scores, np.float64), report.to_dict()
