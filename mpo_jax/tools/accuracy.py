"""The accuracy of a reward model, or of a policy's implicit reward, on the pairs of a file."""

import dataclasses
import math
from typing import Any

import numpy as np

from mpo_jax.config.schema import DpoConfig
from mpo_jax.data.fields import whole
from mpo_jax.data.sources import Row, Source
from mpo_jax.errors import UserError
from mpo_jax.evaluation.accuracy import Accuracy, RewardBench, by_group, length_baseline, unlike
from mpo_jax.tools.opening import OpenModel
from mpo_jax.tools.scoring import SUBSET, open_rows, score

UNNAMED = "(none)"


@dataclasses.dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
      beta: factor of an implicit reward; None for a reward model.
      longer: the accuracy of choosing the response with more characters.
      groups: accuracy by the values of the field asked for; empty if none was.
      bench: RewardBench's sections; None if no row names a subset of it.
      cut, stripped: what was cut to fit and what was taken off, as one sentence each; None if nothing was.
    """

    beta: float | None
    overall: Accuracy
    longer: Accuracy
    groups: dict[str, Accuracy]
    bench: RewardBench | None
    cut: str | None
    stripped: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**dataclasses.asdict(self), "bench": None if self.bench is None else self.bench.to_dict()}


def measure(
    model: OpenModel,
    data: str,
    *,
    reference: OpenModel | None = None,
    beta: float | None = None,
    by: str | None = None,
    batch_size: int,
    max_rows: int | None = None,
) -> Measured:
    """How often a model gives the chosen response the higher reward.

    With a reference the reward is DPO's implicit one, beta * (log p(response) - log p_reference(response)), of sums in
    nats, EOS included (arXiv:2305.18290).

    Args:
      beta: None: that of the policy's training, or else the default of dpo.beta.
      by: field by whose values the rows are grouped too.
      max_rows: the first rows only.

    Raises:
      UserError: if the models are of the wrong kind, the rows are no pairs, or a field holds no name.
    """
    _check_kinds(model, reference)
    if beta is not None and not (math.isfinite(beta) and beta > 0):
        raise UserError(f"--beta {beta}: give a finite number above 0")
    if reference is None and beta is not None:
        raise UserError("--beta is of an implicit reward: give --reference too, or leave it out")
    if reference is not None:
        reference = _alike(model, reference)
    if beta is None:
        beta = (DpoConfig() if model.trained is None else model.trained.dpo).beta
    # before hours of scoring: what the rows lack
    groups, subsets = _names(open_rows(data, model.config.data.columns), by, max_rows)
    scored = score(model, data, batch_size=batch_size, max_rows=max_rows)
    reward_BN = scored.values_BN.astype(np.float64)
    if reference is not None:
        reference_BN = score(reference, data, batch_size=batch_size, max_rows=max_rows).values_BN
        reward_BN = beta * (reward_BN - reference_BN)
    margin_B = reward_BN[:, 0] - reward_BN[:, 1]
    return Measured(
        beta if reference is not None else None,
        Accuracy.of(margin_B),
        length_baseline(scored.responses),
        {} if by is None else by_group(margin_B, groups),
        RewardBench.of(margin_B, subsets),
        scored.cut,
        scored.stripped,
    )


def _check_kinds(model: OpenModel, reference: OpenModel | None) -> None:
    rewards = model.source.head == "value"
    if reference is None and not rewards:
        raise UserError(
            f"{model.path} is a language model: give --reference MODEL, the model that its training started from, for "
            "the accuracy of its implicit reward, or name a reward model"
        )
    if reference is not None and rewards:
        raise UserError(f"{model.path} is a reward model, whose scores need no --reference: leave it out")
    if reference is not None and reference.source.head == "value":
        raise UserError(f"--reference {reference.path} is a reward model: name a language model")


def _alike(model: OpenModel, reference: OpenModel) -> OpenModel:
    """The reference, which reads rows just as the policy does.

    Raises:
      UserError: if their tokens differ.
    """
    if model.codec.tokenizer.get_vocab() != reference.codec.tokenizer.get_vocab():
        raise UserError(
            f"{model.path} and --reference {reference.path} have different tokenizers: an implicit reward compares "
            "both models on the same tokens"
        )
    config = reference.config.model_copy(update={"text": model.config.text})
    return dataclasses.replace(reference, config=config, codec=model.codec, trained=model.trained, given=model.given)


def _names(source: Source, by: str | None, max_rows: int | None) -> tuple[list[str], list[str | None]]:
    """Each row's group and its subset.

    Raises:
      UserError: if there are no pairs, no row has the field `by`, or one has no name there.
    """
    named, subsets = list[str | None](), list[str | None]()
    for place, row in source.rows(max_rows):
        if "chosen" not in row or "rejected" not in row:
            advice = (
                "mpo score scores such rows"
                if "responses" in row
                else "data.columns.chosen=NAME and data.columns.rejected=NAME take them from other columns"
            )
            raise UserError(
                f"{place}: accuracy is of pairs, rows {{prompt, chosen, rejected}}; this one has: "
                f"{', '.join(row) or 'nothing'}. {advice}"
            )
        named.append(None if by is None else _name(row, by, place) or None)
        subsets.append(row[SUBSET] if isinstance(row.get(SUBSET), str) else None)
    if not named:
        raise UserError(f"{source.name} holds no rows")
    if by is not None and set(named) == {None}:
        raise UserError(f"no row of {source.name} has the field --by {by}")
    unnamed = unlike(UNNAMED, named)
    return [unnamed if name is None else name for name in named], subsets


def _name(row: Row, field: str, place: str) -> str | None:
    value = row.get(field)
    if value is not None and not isinstance(value, str | int):
        raise UserError(f"{place}: field {field!r} must be a string, the name of a group, not {type(value).__name__}")
    return None if value is None else whole(str(value), f"{place}: field {field!r}")
