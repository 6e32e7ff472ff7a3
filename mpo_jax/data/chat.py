"""Renders conversations as text with the tokenizer's own chat template."""

from collections.abc import Sequence
from typing import Any, TypedDict

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from mpo_jax.errors import UserError

# Some templates print today's date, so a run could not be repeated or resumed on another day. Templates accept no
# functions from outside, so this macro shadows their `strftime_now`.
_DAY = {"Y": "2024", "y": "24", "m": "07", "d": "26", "B": "July", "b": "Jul", "A": "Friday", "a": "Fri"}
_FIXED_DAY = (
    "{% macro strftime_now(form) %}{{ form"
    + "".join(f"|replace('%{code}', '{text}')" for code, text in _DAY.items())
    + " }}{% endmacro %}"
)


class Message(TypedDict):
    """One turn: role is system, user or assistant."""

    role: str
    content: str


class Chat:
    """A tokenizer's chat template.

    Raises:
      UserError: if the tokenizer has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        template: Any = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise UserError(
                "the tokenizer has no chat template (chat_template.jinja or chat_template in tokenizer_config.json), "
                "but the rows are conversations or text.chat=true: use an instruct model's tokenizer, or plain text"
            )
        self.tokenizer = tokenizer
        self._template = _FIXED_DAY + template if "strftime_now" in template else template

    def prompt(self, messages: Sequence[Message]) -> str:
        """All turns, followed by the header of the assistant's next turn."""
        return self._render(messages, add_generation_prompt=True)

    def response(self, messages: Sequence[Message], reply: str) -> str:
        """The text that the template writes after `prompt(messages)` for this reply, up to and without the EOS.

        Without an EOS after the reply, the text ends with the reply. If the template rewrites earlier turns once there
        is a reply, no such text exists and the reply itself is returned.
        """
        prompt = self.prompt(messages)
        whole = self._render([*messages, {"role": "assistant", "content": reply}], add_generation_prompt=False)
        if not whole.startswith(prompt):
            return reply
        rest = whole[len(prompt) :]
        # an EOS spelled out inside the reply does not end it
        kept = reply if reply in rest else reply.strip()
        end = rest.find(kept) + len(kept) if kept in rest else 0
        eos = str(self.tokenizer.eos_token or "")
        cut = rest.find(eos, end) if eos else -1
        return rest[:cut] if cut >= 0 else rest[:end] or reply

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        conversation: list[Any] = list(messages)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    conversation,
                    tokenize=False,
                    add_generation_prompt=add_generation_prompt,
                    chat_template=self._template,
                )
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"the tokenizer's chat template fails on turns of {roles}: {reason}") from error
