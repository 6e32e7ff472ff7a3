"""What estimates of time and disk space are computed from: the model's sizes and the rows, each read once."""

from functools import cached_property

from mpo_jax.config.schema import Config
from mpo_jax.data.corpus import Corpus, base_tokenizer, load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.models import loading
from mpo_jax.models.spec import DecoderConfig
from mpo_jax.pipeline.stages import count_rows
from mpo_jax.stages.shapes import Amounts


class Basis:
    """Sizes and numbers of rows under one configuration, read when first asked for."""

    def __init__(self, config: Config):
        self.config = config

    @cached_property
    def codec(self) -> TextCodec:
        return TextCodec(base_tokenizer(self.config), self.config.text)

    @cached_property
    def decoder(self) -> DecoderConfig:
        """The base model's sizes; weights are not read."""
        path = self.config.model.path
        if path is not None:
            return loading.open_model(path).fitting(self.codec.vocab_size).decoder
        return loading.scratch_sizes(self.config.model.architecture, self.codec.vocab_size)

    @cached_property
    def corpus(self) -> Corpus:
        return load_corpus(self.config)

    @cached_property
    def amounts(self) -> Amounts:
        """Numbers of rows, and lengths of a sample of them."""
        return count_rows(self.config, self.corpus, self.codec)
