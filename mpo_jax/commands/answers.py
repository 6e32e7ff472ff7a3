"""What A and B are on the command line: files and runs are read, models are sampled."""

import dataclasses
from functools import cache
from pathlib import Path

import jax

from mpo_jax.artifacts import write_lines
from mpo_jax.chat import Chat
from mpo_jax.commands.models import OpenModel, open_model
from mpo_jax.data.records import Renderer
from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import CATEGORY, Answer, Pair, Prompt, find_answers, match, read_answers, read_prompts
from mpo_jax.evaluation.sampling import sample_texts
from mpo_jax.generate import Sampling
from mpo_jax.model import loading
from mpo_jax.runtime import stage_key
from mpo_jax.sharding import check_batch
from mpo_jax.tracker import console

NEW_TOKENS = 256
"""Of a sampled answer at most, where text.max_response_tokens is not given."""


def compared(
    a: str, b: str, data: str | None, *, out: Path, overrides: tuple[str, ...], by: str = CATEGORY
) -> list[Pair]:
    """Both sides' responses to the same prompts.

    A file of rows and a run's folder, whose evaluation has left samples, are read. Anything else is a model, of which
    one response to each prompt of `data` is drawn by `evaluate.greedy`, `evaluate.temperature`, `seed` and
    `text.max_response_tokens`, and kept as `answers-a.jsonl` or `answers-b.jsonl` in `out`.

    Args:
      data: rows {prompt}: the prompts to compare on; None: all that the sides answer.
      by: the field that holds a row's category.

    Raises:
      UserError: if the sides do not answer the same prompts, or if a model comes without prompts.
    """
    prompts = None if data is None else read_prompts(data, by)
    sides = []
    for path, file in ((a, "answers-a.jsonl"), (b, "answers-b.jsonl")):
        found = find_answers(path)
        if found is not None:
            sides.append(read_answers(found, by))
            continue
        if prompts is None:
            raise UserError(
                f"{path} is no file of rows and no run's folder. If it is a model, give the prompts that it is to "
                "answer: --data FILE"
            )
        answers = sample(path, prompts, overrides)
        write_lines(out / file, (dataclasses.asdict(answer) for answer in answers))
        console.print(f"wrote {out / file}", soft_wrap=True)
        sides.append(answers)
    return match(sides[0], sides[1], (a, b), prompts)


def sample(path: str, prompts: list[Prompt], overrides: tuple[str, ...]) -> list[Answer]:
    """A model's response to each prompt; conversations (and plain prompts with text.chat=true) by its chat template."""
    opened = open_model(path, overrides)
    if opened.source.scalar:
        raise UserError(f"{path} is a reward model and writes no text: compare language models, runs or files")
    opened = with_room(opened, overrides)
    evaluate, limits = opened.config.evaluate, opened.config.text
    check_batch(evaluate.batch_size, opened.config.mesh, "evaluate.batch_size")
    render = Renderer(cache(lambda: Chat(opened.codec.tokenizer)), wrap=limits.chat)
    texts = [render.render(prompt.turns, (), f"the prompt {prompt.text[:40]!r}")[0] for prompt in prompts]
    sampling = Sampling(limits.max_response_tokens, temperature=evaluate.temperature, greedy=evaluate.greedy)
    with jax.set_mesh(opened.mesh):
        model, params = loading.load(opened.path, opened.config, opened.mesh, frozen=True)
        key = stage_key(opened.config.seed, "evaluate")
        found, cut = sample_texts(
            model, params, opened.codec, opened.config, opened.mesh, texts, sampling=sampling, key=key,
            tell=lambda done, _: console.print(f"  {path}: {done}/{len(texts)} answers", soft_wrap=True),
        )  # fmt: skip
    if cut:
        console.print(f"[yellow]{path}: {cut} prompts cut to {limits.max_prompt_tokens} tokens[/yellow]")
    return [Answer(p.text, text, p.category) for p, text in zip(prompts, found, strict=True)]


def with_room(opened: OpenModel, overrides: tuple[str, ...], new_tokens: int = NEW_TOKENS) -> OpenModel:
    """With `new_tokens` for what it writes, or half its positions where they are few, and the others for what it reads.

    Limits among the overrides stay as they are.
    """
    if any(override.partition("=")[0].strip().startswith("text.max_") for override in overrides):
        return opened
    return opened.with_room_for(min(new_tokens, opened.source.decoder.max_positions // 2))
