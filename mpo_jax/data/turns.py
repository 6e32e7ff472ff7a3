"""Rendered conversations as turns again: rows for trainers that apply a chat template of their own."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mpo_jax.data.chat import Chat, Message


@dataclasses.dataclass(frozen=True)
class Turns:
    """Writes prompts and responses as TRL's rows have them: conversational where a chat template has rendered the
    prompt, and else strings.

    Turns stay where rows were read: tables of pairs hold the text that was rendered, by which they are found here.

    Attributes:
      conversations: as `Renderer.conversations` has been filled.
      chat: factory of the template that has rendered them; called only if there are conversations.
    """

    conversations: Mapping[str, tuple[Message, ...]]
    chat: Callable[[], Chat]

    def row(self, prompt: str, responses: Mapping[str, str]) -> dict[str, Any]:
        """{prompt, each name in `responses`}, and `tools` if the conversation has them.

        Args:
          prompt: as the corpus has it.
          responses: by the names that they get; in a conversation each becomes a list of one assistant message.
        """
        turns = self.conversations.get(prompt)
        if turns is None:
            return {"prompt": prompt, **responses}
        # a row of a prompt alone needs no template
        before, after = self.chat().around(turns) if responses else ("", "")
        row: dict[str, Any] = {"prompt": [_without_tools(turn) for turn in turns]}
        for name, response in responses.items():
            # a call's text alone does not say what was called
            called = self.conversations.get(prompt + response)
            content = response.removeprefix(before).removesuffix(after)
            row[name] = [Message(role="assistant", content=content) if called is None else called[-1]]
        tools = turns[0].get("tools")
        return {**row, "tools": tools} if tools else row


def _without_tools(turn: Message) -> dict[str, Any]:
    return {key: value for key, value in turn.items() if key != "tools"}
