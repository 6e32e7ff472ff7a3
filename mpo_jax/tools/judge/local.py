"""Judges on this machine: a language model that gets the same prompt, or a reward model."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from mpo_jax.config.schema import Config
from mpo_jax.data.chat import Chat, Message
from mpo_jax.data.rendering import user_turn
from mpo_jax.data.sources import fingerprint_files
from mpo_jax.data.text import TextCodec
from mpo_jax.data.text_rows import TextRow
from mpo_jax.data.tokens import tokenize
from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import Pair
from mpo_jax.evaluation.sampling import sample_texts
from mpo_jax.models import loading
from mpo_jax.models.generate import Sampling
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.tools.judge.cache import content_key
from mpo_jax.tools.judge.calls import Call, Done, Failure, Reply
from mpo_jax.tools.opening import OpenModel
from mpo_jax.tools.scoring import score_texts, values_of

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
    opened: OpenModel, pairs: Sequence[Pair], progress: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray | None, int, int]:
    """[pairs, 2] a reward model's raw scores of A's and B's responses and their tokens as it read them, the latter None
    where it reads text; and how many prompts were cut, and pairs by a response.

    Prompts are those that the policies saw; if they are not known, the model's own template and chat make them. A
    reward model that reads text puts each prompt as the data has it into its own.

    Args:
      progress: called with the number of pairs scored so far.

    Raises:
      UserError: if the prompts are of a chat template, and the model has another.
    """
    config, batch_size = opened.config, opened.config.evaluate.batch_size
    if opened.reads_text:
        texts = _texts(opened, pairs)
        scores, _, cut = score_texts(
            opened, texts, batch_size=2 * batch_size, progress=lambda done, _: progress(done // 2)
        )
        return scores.reshape(-1, 2).astype(np.float64), None, cut, 0
    rows: list[tuple[str, tuple[str, ...]]] = []
    for number, pair in enumerate(pairs, 1):
        if pair.shown is not None:
            rows.append((pair.shown, (pair.a, pair.b)))
            continue
        prompt, replies = opened.renderer.render(pair.prompt, (pair.a, pair.b), f"prompt {number}")
        rows.append((opened.codec.templated(prompt), tuple(replies)))
    rendered = opened.for_rendered_prompts()
    examples, report = tokenize(rendered.codec, rows, cache=config.runtime.token_cache_folder)
    scores = values_of(rendered, examples, batch_size=batch_size, progress=lambda done, _: progress(done))
    tokens = np.asarray([[len(ids) for ids in example.responses] for example in examples])
    return scores.astype(np.float64), tokens, report.truncated_prompts, report.truncated_responses


def _texts(opened: OpenModel, pairs: Sequence[Pair]) -> list[TextRow]:
    """[2 pairs] both rows of each pair for a reward model that reads text."""
    conversations: dict[str, tuple[Message, ...]] = {}
    render, rows = opened.text_renderer(conversations), list[TextRow]()
    for number, pair in enumerate(pairs, 1):
        if pair.shown is not None and pair.shown == pair.prompt:
            raise UserError(
                f"prompt {number} is as the policies' chat template has written it, but {opened.path} reads "
                "conversations by its own: give files of rows whose prompts are turns"
            )
        prompt, replies = render.render(pair.prompt, (pair.a, pair.b), f"prompt {number}")
        rows += [TextRow.of(prompt, reply, complete=True, conversations=conversations) for reply in replies]
    return rows
