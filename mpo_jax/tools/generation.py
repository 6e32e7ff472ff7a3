"""A model's answers to one prompt, given as they grow."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from mpo_jax.data.batches import Widths, collate
from mpo_jax.data.chat import Message
from mpo_jax.data.tokens import Example
from mpo_jax.errors import NotFinite, UserError
from mpo_jax.models.generate import Sampling, make_stream
from mpo_jax.runtime.console import console
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.tools.opening import OpenModel, open_model

CHUNK = 4
"""Tokens that the device draws before the host reads them."""


def generate(
    path: str,
    prompt: str,
    *,
    system: str | None,
    raw: bool,
    max_new_tokens: int | None,
    temperature: float,
    top_p: float,
    num_samples: int,
    overrides: tuple[str, ...],
) -> Iterator[tuple[list[str], bool]]:
    """Every sample's text so far, again and again, and whether it is the end.

    Args:
      prompt: the user's turn where the model was trained on chats, or comes from elsewhere with a chat template; else
        the text to continue, in the template of its training.
      system: the system turn of a chat.
      raw: continue the text, without chat and template.
      max_new_tokens: None: as in training; of a model from elsewhere 256, or half its positions where they are few.
      temperature: 0 takes the likeliest token.

    Raises:
      UserError: if the model writes no text, or there is no chat for the system turn.
    """
    opened = open_model(path, overrides)
    if opened.source.head == "value":
        raise UserError(f"{path} is a reward model and writes no text: use `mpo score`")
    room = max_new_tokens
    if room is None:
        room = opened.config.text.max_response_tokens if opened.knows("max_response_tokens") else opened.new_tokens
    opened = opened.with_room_for(room)
    greedy = temperature == 0.0
    sampling = Sampling(room, num_samples, 1.0 if greedy else temperature, top_p, greedy)
    if raw and "prompt_template" not in opened.given:
        opened = opened.with_text(prompt_template="{prompt}")
    return _stream(opened, _rendered(opened, path, prompt, system, raw=raw), sampling)


def _rendered(opened: OpenModel, path: str, prompt: str, system: str | None, *, raw: bool) -> str:
    """The prompt with the turns of its chat."""
    chat = not raw and opened.chat
    if system is not None and not chat:
        raise UserError(
            "--system needs a tokenizer with a chat template" + (" and no --raw" if raw else "")
            if raw or not opened.knows("chat")
            else f"--system needs a chat, and {path} was trained without (text.chat=false): text.chat=true overrides it"
        )
    if not chat:
        return prompt
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    renderer = opened.renderer
    return renderer.chat().prompt([*turns, *renderer.turns(prompt)])


def _stream(opened: OpenModel, text: str, sampling: Sampling) -> Iterator[tuple[list[str], bool]]:
    """Every sample's text so far, and whether it is the end."""
    config, codec = opened.config, opened.codec
    with jax.set_mesh(opened.mesh):
        model, params = opened.load()
        fitted = codec.prompt(text)
        if fitted.truncated:
            console.print(f"[yellow]the prompt is cut to its last {len(fitted.ids)} of {fitted.full} tokens[/yellow]")
        example = Example(fitted.ids, [])
        batch = collate([example], Widths.of([example]), num_responses=0, size=config.mesh.batch_shards)
        placed = place_batch(batch, opened.mesh)
        allowed_V = jnp.asarray(codec.allowed(model.decoder.vocab_size))
        visit = jnp.zeros_like(placed.prompt_len, jnp.uint32)
        answers: list[str] = []
        for joined, _, finite in make_stream(model, sampling, codec.ends, CHUNK)(
            params, placed, stage_key(config.seed, "generate"), visit, allowed_V
        ):
            ids, length, fine = jax.device_get((joined.response[0], joined.response_len[0], finite[0]))
            if not fine.all():
                raise NotFinite(str(opened.path), "the logits of its next tokens")
            answers = [codec.decode(row[:n]) for row, n in zip(ids, length, strict=True)]
            yield answers, False
        yield answers, True
