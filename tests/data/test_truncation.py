"""mpo_jax.data.text: which part of too long a prompt is cut, its start or the end of its POST section."""

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_jax.config.schema import TextConfig
from mpo_jax.data.text import Fitted, TextCodec
from mpo_jax.errors import UserError
from tests.data.test_text import BYTES


def query(post: str) -> str:
    return f"SUBREDDIT: r/jobs\n\nTITLE: REPOST: quit?\n\nPOST: {post}\n\nTL;DR:"


def kept_post(codec: TextCodec, fitted: Fitted) -> str:
    text = str(codec.tokenizer.decode(fitted.ids, skip_special_tokens=True))
    head, tail = query("\0").split("\0")
    assert text.startswith(head.rstrip(" ")) and text.endswith(tail)
    return text[len(head) : -len(tail)]


def post_codec(
    post: str, *, truncation: Literal["auto", "start", "post"] = "auto", adds_bos: bool = True, **config
) -> TextCodec:
    """A codec with just the room for the query of this post."""
    whole = TextCodec(BYTES[adds_bos], TextConfig(max_prompt_tokens=10**6, **config)).prompt(query(post))
    return TextCodec(BYTES[adds_bos], TextConfig(max_prompt_tokens=len(whole.ids), truncation=truncation, **config))


SECTIONS = "my boss\n\nTL;DR: lost\n\nPOST: the keys\nshould i quit"
LINES = "my boss lost the keys\nshould i quit\r\n\nor 😀 stay?\nthanks"


@pytest.mark.parametrize("truncation", ["auto", "post"])
@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize(
    ("room_for", "kept"),
    [
        (LINES, LINES),
        (LINES[:-1], LINES.rpartition("\n")[0]),
        ("my boss lost the keys\nshould i quit\r\n\nor", "my boss lost the keys\nshould i quit\r\n"),
        ("my boss lost the keys\nshould i quit", "my boss lost the keys\nshould i quit"),
        ("my boss lost the keys\nshould", "my boss lost the keys"),
        ("my boss lost", "my boss lost"),
    ],
)
def test_a_long_post_loses_its_last_lines_else_its_last_characters(truncation, adds_bos, room_for, kept):
    codec = post_codec(room_for, truncation=truncation, adds_bos=adds_bos)
    fitted = codec.prompt(query(LINES))
    assert kept_post(codec, fitted) == kept
    assert fitted.truncated == (kept != LINES)
    assert fitted.full == TextCodec(BYTES[adds_bos], TextConfig()).prompt(query(LINES)).full
    assert (fitted.ids[0] == 0) == adds_bos and fitted.ids.count(0) == adds_bos


def test_the_section_runs_from_the_first_mark_to_the_last():
    codec = post_codec(SECTIONS.removesuffix(" i quit"))
    assert kept_post(codec, codec.prompt(query(SECTIONS))) == SECTIONS.rpartition("\n")[0]


def test_start_keeps_the_end_of_a_post():
    codec = post_codec("my boss lost", truncation="start")
    whole = TextCodec(BYTES[True], TextConfig()).prompt(query(LINES)).ids
    limit = codec.config.max_prompt_tokens
    assert codec.prompt(query(LINES)).ids == [0, *whole[len(whole) - limit + 1 :]]


def test_a_template_around_the_query_stays_whole():
    template = "Human: Please summarize: {prompt}\n\nAssistant:"
    codec = post_codec("my boss lost", prompt_template=template)
    text = codec.tokenizer.decode(codec.prompt(query(LINES)).ids, skip_special_tokens=True)
    assert text == template.replace("{prompt}", query("my boss lost"))


@pytest.mark.parametrize("truncation", ["auto", "post"])
@pytest.mark.parametrize("post", ["", " ", LINES])
def test_where_not_even_an_empty_post_fits_the_start_is_cut(truncation, post):
    codec = TextCodec(BYTES[False], TextConfig(max_prompt_tokens=9, truncation=truncation))
    whole = TextCodec(BYTES[False], TextConfig()).prompt(query(post)).ids
    assert codec.prompt(query(post)) == Fitted(whole[-9:], len(whole))


def test_text_without_a_post_loses_its_start_or_is_refused():
    for text in ("Human: should i quit my job?", "TL;DR: and then POST: my boss lost", "POST: my boss lost the keys"):
        start = TextCodec(BYTES[True], TextConfig(max_prompt_tokens=5, truncation="start")).prompt(text)
        assert TextCodec(BYTES[True], TextConfig(max_prompt_tokens=5)).prompt(text) == start
        with pytest.raises(UserError, match=r"text\.truncation=post, but the prompt .* set text\.truncation=auto"):
            TextCodec(BYTES[True], TextConfig(max_prompt_tokens=5, truncation="post")).prompt(text)
        TextCodec(BYTES[True], TextConfig(truncation="post")).prompt(text)


@given(post=st.text(st.sampled_from("my boss\n\r😀é.\t")), room=st.integers(0, 60))
def test_the_cut_agrees_with_trying_every_cut(post, room):
    whole = TextCodec(BYTES[True], TextConfig(max_prompt_tokens=10**6))
    limit = len(whole.prompt(query("")).ids) + room

    def fits(kept):
        return len(whole.prompt(query(kept)).ids) <= limit

    lines = [post[:i].removesuffix("\r") for i, c in enumerate(post) if c == "\n"]
    expected = [post] if fits(post) else [line for line in lines if line.strip() and fits(line)]
    expected = expected or [post[:i] for i in range(len(post)) if fits(post[:i])]
    codec = TextCodec(BYTES[True], TextConfig(max_prompt_tokens=limit))
    fitted = codec.prompt(query(post))
    assert kept_post(codec, fitted) == expected[-1]
    assert len(fitted.ids) <= limit and fitted.truncated == (not fits(post))
