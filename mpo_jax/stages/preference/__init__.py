"""Preference losses by their `dpo.loss` name, one module each, found through the registry."""

import dataclasses
import importlib
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mpo_jax.config.registry import PREFERENCE_LOSSES
from mpo_jax.config.schema import DpoConfig, Section
from mpo_jax.config.suggestion import suggest
from mpo_jax.errors import UserError
from mpo_jax.types import Mean


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """The inputs of a preference loss; side 0 is the chosen one.

    Attributes:
      logp: [B 2] summed log-probabilities of the responses under the policy, nats.
      ref_logp: [B 2] the same under the reference; None for a loss without a reference.
      length: [B 2] number of response tokens, EOS included.
      valid: [B] False for padding rows.
    """

    logp: Float[Array, "B 2"]
    ref_logp: Float[Array, "B 2"] | None
    length: Int[Array, "B 2"]
    valid: Bool[Array, " B"]

    def per_token(self) -> "Pairs":
        """The same pairs with log-probabilities divided by response length."""
        count_BN = jnp.maximum(self.length, 1)
        ref_BN = None if self.ref_logp is None else self.ref_logp / count_BN
        return dataclasses.replace(self, logp=self.logp / count_BN, ref_logp=ref_BN)

    @property
    def margins(self) -> tuple[Array, Array]:
        """[B] log p(chosen) - log p(rejected) under the policy and under the reference, nats."""
        assert self.ref_logp is not None
        return self.logp[:, 0] - self.logp[:, 1], self.ref_logp[:, 0] - self.ref_logp[:, 1]


class PreferenceLoss(Section, frozen=True):
    """A preference loss with its static options.

    Attributes:
      name: name of the loss in the registry.
      length_normalised: whether log-probabilities are first divided by response length.
      options: keyword arguments of the loss other than beta, by name.
    """

    name: str
    beta: float
    length_normalised: bool = False
    options: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, config: DpoConfig) -> "PreferenceLoss":
        """The loss that a configuration names; missing options take the loss's own defaults.

        Raises:
          UserError: for an option that the loss does not have.
        """
        parameters = inspect.signature(_definition(config.loss).loss).parameters.values()
        known = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "beta"}
        given = dict(config.loss_options)
        if unknown := given.keys() - known.keys():
            name = sorted(unknown)[0]
            hint = suggest(name, [*known]) if known else ": it has none"
            raise UserError(f"dpo.loss_options.{name}: dpo.loss={config.loss} has no such option{hint}")
        shared = {name: getattr(config, name) for name in known if name in type(config).model_fields}
        options = tuple(sorted((known | shared | given).items()))
        return cls(name=config.loss, beta=config.beta, length_normalised=config.length_normalised, options=options)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss needs reference log-probabilities."""
        return _definition(self.name).NEEDS_REFERENCE

    def value(self, pairs: Pairs) -> Mean:
        """The loss, nats per pair."""
        return _definition(self.name).loss(self._read(pairs), beta=self.beta, **dict(self.options))

    def rewards(self, pairs: Pairs) -> Float[Array, "B 2"]:
        """beta times each response's log-ratio to the reference, or its log-probability if there is no reference."""
        pairs = self._read(pairs)
        return self.beta * (pairs.logp if pairs.ref_logp is None else pairs.logp - pairs.ref_logp)

    def _read(self, pairs: Pairs) -> Pairs:
        return pairs.per_token() if self.length_normalised or _definition(self.name).PER_TOKEN else pairs


def _definition(name: str) -> Any:
    """The loss's module: `loss(pairs, *, beta, ...) -> Mean`, NEEDS_REFERENCE, and PER_TOKEN."""
    return importlib.import_module(PREFERENCE_LOSSES[name])
