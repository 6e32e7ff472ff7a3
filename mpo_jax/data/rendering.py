"""Conversations as the text that a model sees: rendered by the chat template, with what it leaves out checked."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Sequence

from mpo_jax.data.chat import Chat, Message, Reply, SystemRefused
from mpo_jax.data.fields import ROLES, UNWRITTEN, Drop
from mpo_jax.data.special_tokens import SpelledTokens, special_tokens
from mpo_jax.errors import UserError
from mpo_jax.runtime.words import counted


def user_turn(prompt: str) -> list[Message]:
    """A plain prompt as a conversation of one user turn."""
    return [{"role": "user", "content": prompt}]


@dataclasses.dataclass(frozen=True)
class Renderer:
    """How conversations become text, and whether plain prompts become conversations first.

    Attributes:
      chat: factory of the chat template; called only for rows that need one.
      wrap: the value of text.chat: whether plain prompts are rendered as conversations too.
      turns: function from a plain prompt to its turns.
      conversations: gets the turns of every prompt that is rendered, by its text, and those of a prompt with a reply
        that calls tools, by the text of both; None: they are not kept.
      ignored: counts the rows whose system turn the template leaves out, by its role; None: they are not counted.
      spelled: what strips end markers of responses and counts special tokens in text; None: texts stay as they are.
    """

    chat: Callable[[], Chat]
    wrap: bool = False
    turns: Callable[[str], list[Message]] = user_turn
    conversations: dict[str, tuple[Message, ...]] | None = None
    spelled: SpelledTokens | None = None
    ignored: Counter[str] | None = None

    def clean(self, prompt: str | list[Message], *replies: Reply) -> list[Reply]:
        """The replies as rows hold them: without end markers, if they are to be stripped."""
        if self.spelled is None:
            return list(replies)
        self.spelled.prompt(prompt)
        return [self.spelled.response(reply) for reply in replies]

    def group(self, prompt: str | list[Message]) -> str:
        """The group of a prompt: its text, or its turns if it has several, with whitespace normalised.

        It does not depend on the model, and a plain prompt has the same group as the equivalent conversation.
        """
        turns = self.turns(prompt) if isinstance(prompt, str) else prompt
        texts = [[turn["role"], one_line(turn["content"]), *turn.get("tool_calls", [])] for turn in turns]
        return texts[0][1] if len(texts) == 1 and texts[0][0] == "user" else json.dumps(texts)

    def render(self, prompt: str | list[Message], replies: Sequence[Reply], place: str) -> tuple[str, list[str]]:
        """Prompt and replies as the model sees them.

        Raises:
          Drop: if a plain prompt has no turns, or the template refuses a system turn or leaves out tools or a turn of
            the user or the assistant.
          UserError: if there is no chat template, or it rejects these turns, or leaves out one of an unknown role.
        """
        if isinstance(prompt, str):
            if not self.wrap:
                return prompt, [reply for reply in replies if isinstance(reply, str)]
            prompt = self.turns(prompt)
            # plain text is joined by a space that does not belong to the turn
            replies = [reply.removeprefix(" ") if isinstance(reply, str) else reply for reply in replies]
        if not prompt:
            raise Drop("empty prompt")
        try:
            chat = self.chat()
            rendered = chat.prompt(prompt), [chat.response(prompt, reply) for reply in replies]
            _check_tools(chat, prompt, replies, rendered[1])
            self._check_turns(chat, prompt, rendered[0])
        except SystemRefused:
            raise Drop("system turn refused by the chat template (text.fold_system=false)") from None
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
        if self.conversations is not None:
            text, texts = rendered
            self.conversations[text] = tuple(prompt)
            self.conversations.update(
                (text + written, (*prompt, reply))
                for reply, written in zip(replies, texts, strict=True)
                if not isinstance(reply, str)
            )
        return rendered

    def _check_turns(self, chat: Chat, prompt: list[Message], shown: str) -> None:
        """Looks for turns whose text the template does not write: of the system counted, others dropped or refused."""
        roles = chat.unwritten(prompt, shown)
        if "system" in roles and self.ignored is not None:
            self.ignored["system"] += 1
        for role in roles:
            if role not in ROLES.values():
                raise UserError(
                    f"{chat.name} leaves out the turns of the role {role!r}: name it "
                    f"{', '.join(sorted(set(ROLES.values())))}, or name a template that writes it as text.chat_template"
                )
        if role := next((role for role in roles if role != "system"), None):
            raise Drop(f"{role} turn {UNWRITTEN}")

    def warnings(self) -> list[str]:
        """What has been counted, a sentence each."""
        number = sum((self.ignored or {}).values())
        if not number:
            return []
        return [
            f"{counted(number, 'conversation has', 'conversations have')} a system turn that the chat template leaves "
            "out: text.fold_system=true puts it in front of the first user turn"
        ]


def one_line(text: str) -> str:
    """The text with every run of whitespace collapsed to one space and the ends stripped."""
    return " ".join(text.split())


def _check_tools(chat: Chat, prompt: list[Message], replies: Sequence[Reply], texts: Sequence[str]) -> None:
    """Drops rows whose tools, calls or results the template does not write, or writes as no text can be."""
    called = any(turn["role"] == "tool" or turn.get("tools") or turn.get("tool_calls") for turn in prompt)
    if called and (what := chat.left_out(prompt)):
        raise Drop(f"{what} {UNWRITTEN}")
    for reply, text in zip(replies, texts, strict=True):
        if isinstance(reply, str):
            continue
        if not text:
            raise Drop(f"tool calls {UNWRITTEN}")
        # responses are tokenized as plain text: the policy would learn to spell the special token
        if token := next((token for token in special_tokens(chat.tokenizer) if token in text), None):
            raise Drop(f"tool call in the reply that the chat template writes with the special token {token}")
