"""The sets of a run: which rows train, select and test, so that no training row has a test prompt."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from mpo_jax.config.schema import DataConfig
from mpo_jax.data.chat import Message
from mpo_jax.data.records import DataReport, Demonstration, Preference, Prompt, is_validation

T = TypeVar("T")
TESTED = "also a test prompt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """All rows of a run. No training row has a test prompt.

    Attributes:
      demonstrations: training rows for SFT.
      pairs: preference rows for selection and DPO.
      reward_pairs: the reward model's training rows: `pairs` without the validation rows.
      validation: preference rows held out from the reward model only; with a test set, other stages train on them.
      held_out: preference rows held out from every stage: data.test_path, or `validation` without a test set.
      prompts: prompts to sample from: data.prompt_path, else those of `pairs`; one per row or distinct, as
        data.prompts says.
      test_prompts: distinct prompts for evaluating policies: data.test_prompt_path, else those of `held_out`.
      categories: category of each test prompt that has one.
      reports: rows read and dropped, one report per source.
      pairs_by_prompt: whether `prompts` are the distinct prompts of `pairs`.
      conversations: the turns of what a chat template has rendered, by its text (`Renderer.conversations`).
      utility: true utility of (prompt, response) in the toy world; None for real data.
    """

    demonstrations: list[Demonstration]
    pairs: list[Preference]
    reward_pairs: list[Preference]
    validation: list[Preference]
    held_out: list[Preference]
    prompts: list[str]
    test_prompts: list[str]
    categories: Mapping[str, str]
    reports: list[DataReport]
    pairs_by_prompt: bool
    conversations: Mapping[str, tuple[Message, ...]] = dataclasses.field(default_factory=dict)
    utility: Callable[[str, str], float] | None = None

    @property
    def sizes(self) -> str:
        """A one-line summary of the sets' sizes."""
        return (
            f"{len(self.demonstrations)} demonstrations, {len(self.pairs)} pairs ({len(self.reward_pairs)} of them for "
            f"the reward model), {len(self.prompts)} prompts to sample from ({len(set(self.prompts))} distinct), "
            f"{len(self.held_out)} held-out pairs, {len(self.test_prompts)} test prompts"
        )

    @property
    def reward_test(self) -> list[Preference]:
        """Preference rows on which reward accuracy is reported; the reward model does not train on them."""
        return self.held_out or self.validation

    def category(self, prompt: str) -> str | None:
        """The category of a test prompt; None if its rows name none or several."""
        return self.categories.get(prompt)

    def sampled_prompts(self, num_prompts: int | None) -> list[str]:
        """The first `num_prompts` prompts (None: all), for selection and for PPO without a selection."""
        return self.prompts[:num_prompts]

    def human_pairs(self, num_prompts: int | None) -> list[Preference]:
        """The labelled pairs of `sampled_prompts`, or the first `num_prompts` pairs if prompts have their own rows."""
        if not self.pairs_by_prompt:
            return self.pairs[:num_prompts]
        part = set(self.sampled_prompts(num_prompts))
        return [row for row in self.pairs if row.prompt in part]


Part = tuple[list[T], DataReport]
"""A source's kept rows and the report that counts the dropped ones."""


def assemble(
    data: DataConfig,
    *,
    demonstrations: list[Part[Demonstration]],
    pairs: list[Part[Preference]],
    tests: Sequence[Part[Preference]] = (),
    prompts: Sequence[Part[Prompt]] = (),
    test_prompts: Sequence[Part[Prompt]] = (),
    conversations: Mapping[str, tuple[Message, ...]] | None = None,
    utility: Callable[[str, str], float] | None = None,
) -> Corpus:
    """Splits the rows into sets; rows that a set must not contain are dropped and counted.

    Args:
      conversations, utility: as `Corpus` has them.
    """

    def is_held(row: Preference | Demonstration) -> bool:
        return is_validation(row.group, seed=0, fraction=data.validation_fraction)

    join = _interleaved if data.order == "interleaved" else _one_after_the_other
    held_out, asked = join([rows for rows, _ in tests]), join([rows for rows, _ in test_prompts])
    tested = {row.group for row in (*held_out, *asked)}
    own = join(_keep(pairs, lambda row: TESTED if row.group in tested else None))
    validation = [row for row in own if is_held(row)]
    reward_pairs = [row for row in own if not is_held(row)]
    if not data.has_test_set:
        own, held_out = reward_pairs, validation
        tested = {row.group for row in validation}

    def unfit(row: Demonstration) -> str | None:
        if row.group in tested:
            return TESTED
        return "validation prompt" if not data.has_test_set and is_held(row) else None

    imitated = join(_keep(demonstrations, unfit))
    sampled = [row.prompt for row in own]
    if data.prompts == "unique":
        sampled = list(dict.fromkeys(sampled))
    if data.prompt_path:
        sampled = [row.prompt for row in join(_keep(prompts, _prompt_filter(tested, data.prompts == "unique")))]
    evaluated = asked if data.test_prompt_path else held_out
    return Corpus(
        demonstrations=imitated,
        pairs=own,
        reward_pairs=reward_pairs,
        validation=validation,
        held_out=held_out,
        prompts=sampled,
        test_prompts=list(dict.fromkeys(row.prompt for row in evaluated)),
        categories=_categories(evaluated),
        reports=[report for _, report in (*pairs, *tests, *demonstrations, *prompts, *test_prompts) if report.source],
        pairs_by_prompt=data.prompts == "unique" and not data.prompt_path,
        conversations=conversations or {},
        utility=utility,
    )


def _one_after_the_other(parts: Sequence[list[T]]) -> list[T]:
    return [row for rows in parts for row in rows]


def _interleaved(parts: Sequence[list[T]]) -> list[T]:
    """The rows of all parts in turns, in proportion to their number; within a part their order stays."""
    placed = [((i + 0.5) / len(rows), row) for rows in parts for i, row in enumerate(rows)]
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def _keep(parts: Iterable[Part[T]], reason: Callable[[T], str | None]) -> list[list[T]]:
    """Each part's rows for which `reason` returns None; the others are counted by reason in their source's report."""
    kept = []
    for rows, report in parts:
        why_not = [(row, reason(row)) for row in rows]
        kept.append([row for row, why in why_not if why is None])
        for _, why in why_not:
            if why is not None:
                report.drop(why)
        report.kept = report.read - report.dropped.total()
    return kept


def _prompt_filter(tested: set[str], each_once: bool) -> Callable[[Prompt], str | None]:
    """Returns the reason to drop a prompt: it is a test prompt or, if `each_once`, a duplicate."""
    seen: set[str] = set()

    def reason(row: Prompt) -> str | None:
        if row.group in tested:
            return TESTED
        if each_once and row.prompt in seen:
            return "repeated prompt"
        seen.add(row.prompt)
        return None

    return reason


def _categories(rows: Sequence[Prompt | Preference]) -> dict[str, str]:
    """The category of each prompt whose rows agree on one."""
    found: dict[str, set[str]] = {}
    for row in rows:
        if row.category is not None:
            found.setdefault(row.prompt, set()).add(row.category)
    return {prompt: names.pop() for prompt, names in found.items() if len(names) == 1}
