"""What a configuration reads, drops and cuts, set by set. Nothing is trained."""

import dataclasses
from collections.abc import Sequence

from mpo_jax.config.schema import Config
from mpo_jax.data.corpus import Corpus, base_tokenizer, load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, Row, TokenReport, tokenize


@dataclasses.dataclass(frozen=True)
class DataReport:
    """A configuration's data as its stages get them.

    Attributes:
      corpus: the rows, with a report of every source.
      sets: by name, a set's examples and the report of their lengths.
    """

    corpus: Corpus
    codec: TextCodec
    sets: dict[str, tuple[list[Example], TokenReport]]

    @property
    def findings(self) -> list[str]:
        """What is wrong with the tokens of the sets, a sentence each."""
        limit = self.codec.config.max_response_tokens
        return [finding for name, (_, report) in self.sets.items() for finding in report.findings(name, limit)]


def report_data(config: Config) -> DataReport:
    """Reads and tokenizes every set of the configuration."""
    corpus = load_corpus(config)
    codec = TextCodec(base_tokenizer(config), config.text)
    folder = config.runtime.token_cache_folder
    return DataReport(corpus, codec, {name: tokenize(codec, rows, cache=folder) for name, rows in _sets(corpus)})


def _sets(corpus: Corpus) -> list[tuple[str, Sequence[Row]]]:
    return [
        ("demonstrations", [(row.prompt, (row.response,)) for row in corpus.demonstrations]),
        ("pairs", [(row.prompt, (row.chosen, row.rejected)) for row in corpus.pairs]),
        ("reward model's pairs", [(row.prompt, (row.chosen, row.rejected)) for row in corpus.reward_pairs]),
        ("validation", [(row.prompt, (row.chosen, row.rejected)) for row in corpus.validation]),
        ("held out", [(row.prompt, (row.chosen, row.rejected)) for row in corpus.held_out]),
        ("prompts", [(prompt, ()) for prompt in corpus.prompts]),
        ("test prompts", [(prompt, ()) for prompt in corpus.test_prompts]),
    ]
