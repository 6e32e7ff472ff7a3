"""The two sides of a comparison, A and B: files and runs are read, models are sampled."""

import dataclasses
import os
from pathlib import Path

import jax
from rich.markup import escape

from mpo_jax.config.base import Names
from mpo_jax.config.load import load_config
from mpo_jax.data.records import Drop
from mpo_jax.data.sources import FILE_SUFFIXES
from mpo_jax.errors import UserError
from mpo_jax.evaluation.answers import (
    CATEGORY,
    Answer,
    Pair,
    Prompt,
    check_answer_columns,
    find_answers,
    match,
    read_answers,
    read_prompts,
)
from mpo_jax.evaluation.sampling import sample_texts
from mpo_jax.models.generate import Sampling
from mpo_jax.runtime.console import console
from mpo_jax.runtime.files import write_lines
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import check_batch
from mpo_jax.tools.opening import OpenModel, open_model


def compared(
    a: str, b: str, data: str | None, *, out: Path, overrides: tuple[str, ...], by: str = CATEGORY
) -> list[Pair]:
    """Both sides' responses to the same prompts.

    A side is a file of rows, whose field FIELD responds if it is named as `FILE:FIELD` (so that the chosen and the
    rejected responses of a file of pairs are two sides), a run's folder with the samples of its evaluation, or a model.
    A model answers each prompt of `data` once, by `evaluate.greedy`, `evaluate.temperature` and `seed`, under the
    template, chat setting and lengths of its training unless the overrides give others; `out` gets its answers as
    `answers-a.jsonl` or `answers-b.jsonl`.

    Args:
      data: rows {prompt}: the prompts to compare on; None: all that the sides answer. Fields of these rows and of the
        sides' are taken from other columns by data.columns.
      by: the field that holds a row's category.

    Raises:
      UserError: if the sides do not answer the same prompts, or if there are no prompts for a model.
    """
    columns = load_config(None, overrides).data.columns
    if columns:
        check_answer_columns(named_rows(a, b, data), by, columns)
    prompts = None if data is None else read_prompts(data, by, columns)
    # both are opened before either model samples
    opened = [_open_side(path, prompts, overrides, by, columns) for path in (a, b)]
    sides = []
    for path, side, file in zip((a, b), opened, ("answers-a.jsonl", "answers-b.jsonl"), strict=True):
        if isinstance(side, OpenModel):
            assert prompts is not None
            side = sample(path, side, prompts)
            write_lines(out / file, (dataclasses.asdict(answer) for answer in side))
            console.print(f"wrote {out / file}", soft_wrap=True)
        sides.append(side)
    pairs = match(sides[0], sides[1], (a, b), prompts)
    if unlike := [pair for pair in pairs if not pair.alike]:
        console.print(
            f"[yellow]A and B were asked under different templates, chat settings or lengths in {len(unlike)} of "
            f"{len(pairs)} pairs: those prompts are shown as the data have them[/yellow]",
            soft_wrap=True,
        )
    return pairs


def _open_side(
    path: str, prompts: list[Prompt] | None, overrides: tuple[str, ...], by: str, columns: Names
) -> list[Answer] | OpenModel:
    """A side's answers, or the model that is to give them."""
    file, field = _file_and_field(path)
    found = find_answers(file)
    if found is not None:
        return read_answers(found, by, columns, field)
    if prompts is None:
        raise UserError(
            f"{path} is no file of rows ({', '.join(FILE_SUFFIXES)}; with the field that responds: FILE:FIELD) and no "
            "run's folder. If it is a model, give the prompts that it is to answer: --data FILE"
        )
    opened = open_model(path, overrides)
    if opened.source.head == "value":
        raise UserError(f"{path} is a reward model and writes no text: compare language models, runs or files")
    check_batch(opened.config.evaluate.batch_size, opened.mesh, "evaluate.batch_size")
    return _with_room(opened)


def named_rows(a: str, b: str, data: str | None) -> list[str]:
    """The rows whose columns data.columns may name: those of --data, and of the sides that are files or runs."""
    sides = [find_answers(_file_and_field(path)[0]) for path in (a, b)]
    return [path for path in (data, *sides) if path is not None]


def _file_and_field(path: str) -> tuple[str, str | None]:
    """`FILE:FIELD` as its parts; anything else has no field."""
    colons = [place for place, character in enumerate(path) if character == ":"]
    if not os.path.lexists(path):
        for place in colons:
            file, field = path[:place], path[place + 1 :]
            # a field's name may hold colons too
            if field and file.endswith(FILE_SUFFIXES):
                return file, field
    return path, None


def sample(path: str, opened: OpenModel, prompts: list[Prompt]) -> list[Answer]:
    """A model's response to each prompt; conversations (and plain prompts where text.chat is true) as a chat."""
    evaluate, limits = opened.config.evaluate, opened.config.text
    texts = [_rendered(opened, prompt) for prompt in prompts]
    sampling = Sampling(limits.max_response_tokens, temperature=evaluate.temperature, greedy=evaluate.greedy)
    with jax.set_mesh(opened.mesh):
        model, params = opened.load()
        key = stage_key(opened.config.seed, "evaluate")
        found, cut = sample_texts(
            model, params, opened.codec, texts, sampling=sampling, key=key, batch_size=evaluate.batch_size,
            mesh=opened.mesh, cache=opened.config.runtime.token_cache_folder, name=path,
            progress=lambda done, _: console.print(f"  {path}: {done}/{len(texts)} answers", soft_wrap=True),
        )  # fmt: skip
    if cut:
        console.print(f"[yellow]{escape(path)}: {cut} prompts cut to {limits.max_prompt_tokens} tokens[/yellow]")
    seen = opened.codec.as_seen(texts)
    return [
        Answer(prompt.text, response, prompt.category, None if shown == prompt.text else shown)
        for prompt, response, shown in zip(prompts, found, seen, strict=True)
    ]


def _rendered(opened: OpenModel, prompt: Prompt) -> str:
    place = f"the prompt {prompt.text[:40]!r}"
    try:
        return opened.renderer.render(prompt.turns, (), place)[0]
    except Drop as reason:
        raise UserError(f"{place}: {reason}: drop the row") from reason


def _with_room(opened: OpenModel) -> OpenModel:
    """The model with room for `OpenModel.new_tokens`, where neither training nor the user sets lengths."""
    if opened.knows("max_prompt_tokens") or opened.knows("max_response_tokens"):
        return opened
    return opened.with_room_for(opened.new_tokens)
