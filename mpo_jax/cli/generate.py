"""`mpo generate`: a model's answer to one prompt, written as it is drawn."""

import dataclasses
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from mpo_jax.cli.models import OpenModel, open_model
from mpo_jax.data.batches import Widths, collate
from mpo_jax.data.chat import Message
from mpo_jax.data.tokens import Example
from mpo_jax.errors import NotFinite, UserError
from mpo_jax.models import loading
from mpo_jax.models.generate import Sampling, make_stream
from mpo_jax.runtime.console import console
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import place_batch

NEW_TOKENS = 256
CHUNK = 4
"""Tokens between two looks at the device."""


def generate(
    path: str,
    prompt: str,
    *,
    system: str | None,
    raw: bool,
    max_new_tokens: int | None,
    sampling: Sampling,
    overrides: tuple[str, ...],
) -> None:
    """Prints `sampling.num_samples` answers; the first or only one as it grows, others once they are done.

    Args:
      prompt: the user's turn where the model was trained on chats, or comes from elsewhere with a chat template; else
        the text to continue, in the template of its training; "-" reads it from standard input.
      system: the system turn of a chat.
      raw: continue the text, without chat and template.
      max_new_tokens: absent: as in training; of a model from elsewhere 256, or half its positions where they are few.
    """
    opened = open_model(path, overrides)
    if opened.source.head == "value":
        raise UserError(f"{path} is a reward model and writes no text: use `mpo score`")
    room = max_new_tokens
    if room is None:
        few = min(NEW_TOKENS, opened.source.decoder.max_positions // 2)
        room = opened.config.text.max_response_tokens if opened.knows("max_response_tokens") else few
    opened, sampling = opened.with_room_for(room), dataclasses.replace(sampling, max_new_tokens=room)
    text = sys.stdin.read() if prompt == "-" else prompt
    if raw and "prompt_template" not in opened.given:
        opened = opened.with_text(prompt_template="{prompt}")
    chat = not raw and opened.chat
    if system is not None and not chat:
        raise UserError(
            "--system needs a tokenizer with a chat template" + (" and no --raw" if raw else "")
            if raw or not opened.knows("chat")
            else f"--system needs a chat, and {path} was trained without (text.chat=false): text.chat=true overrides it"
        )
    if chat:
        turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        renderer = opened.renderer
        text = renderer.chat().prompt([*turns, *renderer.turns(text)])
    first = ""
    for answers, done in _answers(opened, text, sampling):
        # a character may come in several tokens: what is not whole yet waits
        grown = answers[0].rstrip("\ufffd") if not done else answers[0]
        sys.stdout.write(grown[len(first) :])
        sys.stdout.flush()
        first = grown
        if done:
            for answer in answers[1:]:
                sys.stdout.write(f"\n---\n{answer}")
    sys.stdout.write("\n")


def _answers(opened: OpenModel, text: str, sampling: Sampling) -> Iterator[tuple[list[str], bool]]:
    """Every sample's text so far, and whether this is the end."""
    config, codec = opened.config, opened.codec
    with jax.set_mesh(opened.mesh):
        model, params = loading.load(opened.path, config, opened.mesh, frozen=True)
        fitted = codec.prompt(text)
        if fitted.truncated:
            console.print(f"[yellow]the prompt is cut to its last {len(fitted.ids)} of {fitted.full} tokens[/yellow]")
        example = Example(fitted.ids, [])
        batch = collate([example], Widths.of([example]), num_responses=0, size=config.mesh.batch_shards)
        placed = place_batch(batch, opened.mesh)
        allowed_V = jnp.asarray(codec.allowed(model.decoder.vocab_size))
        visit = jnp.zeros_like(placed.prompt_len, jnp.uint32)
        answers: list[str] = []
        for joined, _, finite in make_stream(model, sampling, codec.eos_id, CHUNK)(
            params, placed, stage_key(config.seed, "generate"), visit, allowed_V
        ):
            ids, length, fine = jax.device_get((joined.response[0], joined.response_len[0], finite[0]))
            if not fine.all():
                raise NotFinite(str(opened.path), "the logits of its next tokens")
            answers = [codec.decode(row[:n]) for row, n in zip(ids, length, strict=True)]
            yield answers, False
        yield answers, True
