"""Published layouts of rows that are no {prompt, chosen, rejected} or {messages}, turned into these.

{conversations}                                   ShareGPT's messages {from, value}; with `system`, its first turn
{conversations, chosen, rejected}                 the same as a prompt, with two replies
{prompt, response_0, response_1, better_response_id}    PKU-SafeRLHF
{chosen, rejected}, strings                       the prompt is what both begin with
"""

import re
from typing import Any

from mpo_jax.data.fields import Drop, text_field
from mpo_jax.data.text_files import Row
from mpo_jax.errors import UserError

BETTER = "better_response_id"
RESPONSES = ("response", "completion", "messages")
"""Fields that hold what a demonstration shows, the first that a row has."""
FIELDS = ("prompt", "chosen", "rejected", *RESPONSES, "category", "conversations", "system", "tools", "response_0",
          "response_1", BETTER)  # fmt: skip
"""All fields of the generic readers' layouts."""
REPLY_MARK = re.compile(
    r"(?:^|\n)(?:assistant|ASSISTANT|Assistant):|### (?:Assistant|Response):|<\|assistant\|>|\[/INST\]|"
    r"<\|im_start\|>assistant\n|<start_of_turn>model\n|<\|start_header_id\|>assistant<\|end_header_id\|>"
)
"""What stands in front of the assistant's turns in dialogues that are written as text."""


def standard(row: Row, place: str) -> Row:
    """The row in a layout that the generic readers know; rows of other layouts as they are.

    Raises:
      Drop: if the row does not say which response is better, or its sides have different prompts.
      UserError: if the prompt cannot be found.
    """
    if BETTER in row and "chosen" not in row:
        return _better_first(row, place)
    if row.get("conversations") is not None and row.get("prompt") is None:
        return _shared(row, place)
    if "prompt" not in row and all(isinstance(row.get(side), str) for side in ("chosen", "rejected")):
        return _split(row, place)
    return row


def _better_first(row: Row, place: str) -> Row:
    better = row[BETTER]
    if better is None:
        raise Drop(f"{BETTER} is null")
    if isinstance(better, bool) or str(better) not in ("0", "1"):
        raise UserError(f"{place}: field {BETTER!r} must be 0 or 1, the number of the better response, not {better!r}")
    sides = ["response_0", "response_1"]
    chosen, rejected = sides if str(better) == "0" else reversed(sides)
    return {**row, "chosen": text_field(row, chosen, place), "rejected": text_field(row, rejected, place)}


def _shared(row: Row, place: str) -> Row:
    turns: Any = row["conversations"]
    if not isinstance(turns, list):
        raise UserError(f"{place}: field 'conversations' must be a list of messages, not {type(turns).__name__}")
    speakers = [one.get("from", one.get("role")) for one in turns[:1] if isinstance(one, dict)] if turns else []
    if isinstance(row.get("system"), str) and row["system"].strip() and speakers != ["system"]:
        turns = [{"from": "system", "value": row["system"]}, *turns]
    if "chosen" in row or "rejected" in row:
        return {**row, "prompt": turns}
    return row if any(row.get(field) is not None for field in RESPONSES) else {**row, "messages": turns}


def _split(row: Row, place: str) -> Row:
    """The sides' common beginning as the prompt.

    It ends after the last mark in front of a turn of the assistant's; in text without such marks at the last line
    break. Line breaks after the mark belong to the prompt, spaces to the responses.
    """
    chosen, rejected = row["chosen"], row["rejected"]
    if chosen == rejected:
        raise Drop("chosen equals rejected")
    common = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = chosen[: min(len(chosen), len(rejected)) if common is None else common]
    marks = list(REPLY_MARK.finditer(shared))
    if marks:
        end = marks[-1].end()
        end += len(shared[end:]) - len(shared[end:].lstrip("\r\n"))
    elif REPLY_MARK.search(chosen) or REPLY_MARK.search(rejected):
        raise Drop("rejected has another prompt")
    else:
        end = shared.rfind("\n") + 1
    if not shared[:end].strip():
        raise UserError(
            f"{place}: the row has no field 'prompt', and chosen and rejected share no beginning that ends in "
            "'Assistant:' or at a line break: name the column that holds the prompt, data.columns.prompt=NAME"
        )
    if marks and any(REPLY_MARK.search(side, end) for side in (chosen, rejected)):
        raise Drop("rejected has another prompt")
    return {**row, "prompt": shared[:end], "chosen": chosen[end:], "rejected": rejected[end:]}
