"""Renders conversations as text with the tokenizer's own chat template."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from jinja2.exceptions import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from mpo_jax.config.schema import TextConfig
from mpo_jax.data.template import render
from mpo_jax.errors import UserError
from mpo_jax.untrusted import read_text

TEMPLATE_BYTES = 1_000_000
"""Size up to which a file is taken for a chat template."""
SHOWN = 40
"""Characters before a reply that an error shows."""
MARK = "\ue000reply\ue000"
"""A reply that stands in no other text, to find where a template puts replies."""
TURN_MARK = "\ue001\ue000\ue001"
"""A turn that stands in no other text, and that no letter case changes, to find whether a template writes a turn."""
_OPEN_TAG = re.compile(r"(?P<left>[<\[\u25c1])(?P<name>\w+)(?P<right>[>\]\u25b7])")


class Message(TypedDict):
    """One turn: role is system, user, assistant or tool.

    Attributes:
      tool_calls: what the assistant calls, {type: function, function: {name, arguments}}.
      name, tool_call_id: which call a tool's result is of.
      tools: JSON schemas of what the assistant may call in the whole conversation; of its first turn alone.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, Any]]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    tools: NotRequired[list[Any]]


Reply = str | Message
"""What the assistant answers: text, or a message that calls tools."""


class SystemRefused(UserError):
    """The chat template fails on a system turn, and not on the same text in the user's turn."""


def read_template(path: str) -> str:
    """The text of the file that `text.chat_template` names; it is not run here.

    Raises:
      UserError: if there is no such file, or it is no text.
    """
    key, file = f"text.chat_template={path}", Path(path).expanduser()
    try:
        text = read_text(file, max_bytes=TEMPLATE_BYTES)
    except UserError as error:
        raise UserError(f"{key}: {error}: name a file with a Jinja template") from error
    if not text.strip():
        raise UserError(f"{key}: the file is empty: name a file with a Jinja template")
    return text


class Chat:
    """A tokenizer's chat template; of several, the default one, and for conversations with tools `tool_use`.

    Args:
      options: the template's own options, such as enable_thinking.
      fold_system: put a system turn that the template refuses or leaves out in front of the first user turn.
      name: of the template, for messages.

    Raises:
      UserError: if the tokenizer has no template, or the template does not mention an option.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        options: Mapping[str, bool | int | float | str] | None = None,
        fold_system: bool = False,
        name: str = "the tokenizer's chat template",
    ):
        template: Any = tokenizer.chat_template
        named: dict[str, Any] = template if isinstance(template, dict) else {"default": template}
        template = named.get("default")
        if not template:
            raise UserError(
                "the tokenizer has no chat template (chat_template.jinja or chat_template in tokenizer_config.json), "
                "but the rows are conversations or text.chat=true: use an instruct model's tokenizer, name a template "
                "as text.chat_template, or use plain text"
            )
        self.tokenizer = tokenizer
        self.fold_system = fold_system
        self.name = name
        self._options: dict[str, Any] = dict(options or {})
        self._template: str = template
        # some models have a template of their own for conversations with tools, as Command R and Hermes
        self._with_tools: str = named.get("tool_use") or template
        # the roles of conversations whose every turn is known to be written
        self._written: set[tuple[str, ...]] = set()
        for option in self._options:
            if not re.search(rf"\b{re.escape(option)}\b", self._template + self._with_tools):
                raise UserError(
                    f"text.template_options.{option}: {name} does not mention {option}, so it would change nothing: "
                    "check the spelling, or remove it"
                )

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, text: TextConfig) -> "Chat":
        """A tokenizer's chat template under the options of a configuration."""
        name = "the tokenizer's chat template"
        if text.chat_template is not None:
            name = f"the chat template {text.chat_template}"
        return cls(tokenizer, options=dict(text.template_options), fold_system=text.fold_system, name=name)

    def prompt(self, messages: Sequence[Message]) -> str:
        """All turns, followed by the header of the assistant's next turn.

        Raises:
          SystemRefused: if the template refuses a system turn, unless it is to be folded.
          UserError: if the template fails for another reason.
        """
        return self._render(self._accepted(messages), add_generation_prompt=True)

    def response(self, messages: Sequence[Message], reply: Reply) -> str:
        """The text that the template writes after `prompt(messages)` for this reply, up to and without the EOS.

        Without an EOS after the reply, the text ends with the reply. If the template writes no such text, since it
        rewrites earlier turns once there is a reply or leaves out what the prompt ends with, the reply follows the
        prompt as it is: training sees the prompt that sampling continues.

        Raises:
          UserError: as `prompt`; or if the prompt ends inside a tag that the reply does not close.
        """
        turns = self._accepted(messages)
        if not isinstance(reply, str):
            return self._calling(turns, reply)
        prompt = self._render(turns, add_generation_prompt=True)
        whole = self._with_reply(turns, reply)
        if not whole.startswith(prompt):
            return self._behind_prompt(turns, prompt, reply)
        rest = whole[len(prompt) :]
        # an EOS spelled out inside the reply does not end it
        kept = reply if reply in rest else reply.strip()
        end = rest.find(kept) + len(kept) if kept in rest else 0
        eos = str(self.tokenizer.eos_token or "")
        cut = rest.find(eos, end) if eos else -1
        return rest[:cut] if cut >= 0 else rest[:end] or reply

    def around(self, messages: Sequence[Message]) -> tuple[str, str]:
        """What `response` writes before and after a reply's own text, such as a space.

        Empty where the prompt ends inside a tag: a reply has to close it, and is written as it is.
        """
        try:
            before, _, after = self.response(messages, MARK).partition(MARK)
        except UserError:
            return "", ""
        return before, after

    @cached_property
    def continues_prompts(self) -> bool:
        """Whether a whole conversation is what a policy reads and learns to write: prompt, response, EOS, and no more.

        Found on a conversation of one turn.
        """
        turns, eos = [Message(role="user", content="?")], str(self.tokenizer.eos_token or "")
        try:
            written = self.prompt(turns) + self.response(turns, MARK) + eos
            return bool(eos) and self._with_reply(turns, MARK) == written
        except UserError:
            return False

    def conversation(self, messages: Sequence[Message], reply: str) -> tuple[str, str, str]:
        """A whole conversation, as a classifier reads it: what stands before the reply, the reply, and what follows it.

        Raises:
          SystemRefused, UserError: as `prompt`.
        """
        turns = self._accepted(messages)
        whole = self._with_reply(turns, reply)
        header, footer = self._around_reply(turns)
        if len(whole) < len(header) + len(footer) or not (whole.startswith(header) and whole.endswith(footer)):
            # a template can look at the reply, for thoughts in it: the text is its work, and nobody knows whose
            return whole, "", ""
        return header, whole[len(header) : len(whole) - len(footer)], footer

    def _behind_prompt(self, turns: Sequence[Message], prompt: str, reply: str) -> str:
        """The reply as it has to follow a prompt that is no beginning of the whole conversation."""
        header, footer = self._around_reply(turns)
        if self._with_reply(turns, f" {MARK} ") == header + MARK + footer:
            reply = reply.strip()
        asked = self._render(turns, add_generation_prompt=False)
        tail = _beyond(prompt[_common(prompt, asked) :], header)
        opened = tail.strip()
        if opened and reply.lstrip().startswith(opened):
            reply = reply.lstrip().removeprefix(opened).removeprefix(tail[len(tail.rstrip()) :])
        for tag in _OPEN_TAG.finditer(tail):
            closing = f"{tag['left']}/{tag['name']}{tag['right']}"
            if closing not in tail[tag.end() :] and closing not in reply:
                raise UserError(
                    f"what {self.name} writes before a reply ends inside {tag[0]}, which this reply does not close: "
                    f"sampling would follow {prompt[-SHOWN:]!r}, but in a whole conversation the reply follows "
                    f"{header[-SHOWN:]!r}. If that is a tag of thoughts, end them in the reply with {closing}, or turn "
                    "them off if the template can (text.template_options, such as {enable_thinking: false}); else "
                    "name another template as text.chat_template"
                )
        eos = str(self.tokenizer.eos_token or "")
        cut = footer.find(eos) if eos else -1
        return reply + footer[:cut] if cut >= 0 else reply

    def _around_reply(self, turns: Sequence[Message]) -> tuple[str, str]:
        """What a whole conversation has before and after its last reply."""
        header, found, footer = self._with_reply(turns, MARK).partition(MARK)
        if not found:
            raise UserError(
                f"{self.name} leaves out the reply of a conversation: name another one as text.chat_template"
            )
        return header, footer

    def _accepted(self, messages: Sequence[Message]) -> Sequence[Message]:
        """The turns, with those of the system folded into the user's where the template refuses them."""
        if all(message["role"] != "system" for message in messages):
            return messages
        try:
            shown = self._render(messages, add_generation_prompt=True)
            if self.fold_system and "system" in self._unwritten(messages, shown):
                return fold_system_turns(messages)
            return messages
        except UserError:
            folded = fold_system_turns(messages)
            try:
                self._render(folded, add_generation_prompt=True)
            except UserError:
                folded = None
            if folded is None:
                raise
            if not self.fold_system:
                raise SystemRefused(
                    f"{self.name} refuses a system turn: text.fold_system=true puts it in front of the first user turn"
                ) from None
            return folded

    def _calling(self, turns: Sequence[Message], reply: Message) -> str:
        """The text of a reply that calls tools; empty where the template leaves the calls out."""
        prompt, whole = self._render(turns, add_generation_prompt=True), self._with_reply(turns, reply)
        if whole == self._with_reply(turns, reply["content"]):
            return ""
        header, footer = self._around_reply(turns)
        eos = str(self.tokenizer.eos_token or "")
        start = prompt if whole.startswith(prompt) else header
        if not whole.startswith(start):
            raise UserError(
                f"{self.name} writes a reply that calls tools behind another text than the prompt that sampling "
                "continues: name another template as text.chat_template"
            )
        text = whole[len(start) :]
        if eos and eos in text:
            return text.rpartition(eos)[0]
        return text.removesuffix(footer)

    def left_out(self, messages: Sequence[Message]) -> str | None:
        """What of tools, their calls and their results the template does not write; None if it writes all."""
        turns = self._accepted(messages)
        shown = self._render(turns, add_generation_prompt=True)
        for key, what in (("tools", "tools"), ("tool_calls", "tool calls")):
            if any(turn.get(key) for turn in turns):
                without = [cast(Message, {name: turn[name] for name in turn if name != key}) for turn in turns]
                if self._render(without, add_generation_prompt=True) == shown:
                    return what
        results = (turn["content"].strip() for turn in turns if turn["role"] == "tool")
        # as JSON, quotation marks and line breaks in a result are escaped
        return None if all(r in shown or json.dumps(r)[1:-1] in shown for r in results) else "tool results"

    def unwritten(self, messages: Sequence[Message], shown: str) -> list[str]:
        """The roles of the turns whose text the template does not write, each once.

        Calls and results of tools are `left_out`'s.

        Args:
          shown: the conversation as `prompt` renders it.
        """
        return self._unwritten(self._accepted(messages), shown)

    def _unwritten(self, turns: Sequence[Message], shown: str) -> list[str]:
        roles = tuple(turn["role"] for turn in turns)
        said = [place for place, turn in enumerate(turns) if turn["content"].strip() and turn["role"] != "tool"]
        known, lost = roles in self._written, list[str]()
        for place in said:
            # a short text can stand in the rendering by chance
            if known and turns[place]["content"].strip() in shown:
                continue
            marked = list(turns)
            marked[place] = turns[place].copy()
            marked[place]["content"] = TURN_MARK
            try:
                if TURN_MARK not in self._render(marked, add_generation_prompt=True):
                    lost.append(turns[place]["role"])
            except UserError:  # it looks at the text, and so does not ignore it
                continue
        if not lost and len(said) == len(turns):
            self._written.add(roles)
        return list(dict.fromkeys(lost))

    def _with_reply(self, turns: Sequence[Message], reply: Reply) -> str:
        last = Message(role="assistant", content=reply) if isinstance(reply, str) else reply
        return self._render([*turns, last], add_generation_prompt=False)

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        tools = messages[0].get("tools") if messages else None
        conversation: list[Any] = [{key: turn[key] for key in turn if key != "tools"} for turn in messages]
        try:
            return str(
                render(
                    self._with_tools if tools else self._template,
                    conversation,
                    special_tokens=self.tokenizer.special_tokens_map,
                    add_generation_prompt=add_generation_prompt,
                    tools=tools,
                    options=self._options,
                )
            )
        except Exception as error:  # a template comes from elsewhere and can fail in any way
            line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
            roles = ", ".join(str(message.get("role")) for message in messages)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.name} fails on turns of {roles}: {line}{reason}") from error


def fold_system_turns(messages: Sequence[Message]) -> list[Message]:
    """The turns with every system turn's text in front of the user turn after it, or as one where there is none."""
    folded: list[Message] = []
    waiting: list[str] = []
    for message in messages:
        if message["role"] == "system":
            waiting += [message["content"]] if message["content"].strip() else []
            continue
        if waiting and message["role"] == "user":
            message = Message(role="user", content="\n\n".join([*waiting, message["content"]]))
        elif waiting:
            folded.append(Message(role="user", content="\n\n".join(waiting)))
        waiting = []
        folded.append(message)
    if waiting:
        folded.append(Message(role="user", content="\n\n".join(waiting)))
    return offering(folded, messages[0].get("tools", []) if messages else [])


def offering(messages: Sequence[Message], tools: Sequence[Any]) -> list[Message]:
    """The conversation with tools that the assistant may call."""
    if not tools or not messages:
        return list(messages)
    first = messages[0].copy()
    first["tools"] = list(tools)
    return [first, *messages[1:]]


def _common(one: str, other: str) -> int:
    """The number of characters with which both begin."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _beyond(generation: str, header: str) -> str:
    """What a generation prompt adds to the header that stands before the reply in a whole conversation."""
    lengths = range(len(generation), -1, -1)
    return generation[next(length for length in lengths if header.endswith(generation[:length])) :]
