"""Direct preference optimisation on pairs. The reference's log-probabilities are computed once, before training."""

import dataclasses
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mpo_jax.config.schema import Config, DpoConfig, OptimConfig
from mpo_jax.data.batches import Buckets, map_batches
from mpo_jax.data.corpus import load_corpus
from mpo_jax.data.pair_table import PairTable, Subset
from mpo_jax.data.records import Preference
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import Example, tokenize
from mpo_jax.losses import cdpo_loss, chosen_nll_loss, dpo_loss, ipo_loss
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime.sharding import place_batch, replicated
from mpo_jax.training.loop import check_sizes, fit_examples, make_update, state_sharding
from mpo_jax.training.validation import first_rows, make_evaluate, make_measure
from mpo_jax.types import Artifact, Mean, Metrics, Params, PromptBatch


@dataclasses.dataclass(frozen=True)
class DpoLoss:
    """The static choices of the objective."""

    kind: str
    beta: float
    label_smoothing: float
    length_normalised: bool
    nll_coef: float

    @classmethod
    def of(cls, config: DpoConfig) -> "DpoLoss":
        return cls(config.loss, config.beta, config.label_smoothing, config.length_normalised, config.nll_coef)

    def preference(self, policy_margin_B: Array, ref_margin_B: Array, valid_B: Array) -> Mean:
        margins = policy_margin_B, ref_margin_B
        known: dict[str, Any] = {"beta": self.beta, "valid_B": valid_B}
        if self.kind == "cdpo":
            return cdpo_loss(*margins, label_smoothing=self.label_smoothing, **known)
        return ipo_loss(*margins, **known) if self.kind == "ipo" else dpo_loss(*margins, **known)


def objective(
    model: Model, loss: DpoLoss, params: Params, batch: tuple[PromptBatch, Float[Array, "B 2"]]
) -> tuple[Metrics, Metrics]:
    """The preference loss, and the NLL term where it has a weight. `batch`: pairs, reference log-probs."""
    joined, ref_logp_BN = batch
    tokens = forward.join(joined)
    sum_BN = forward.response_logps(model, params, joined)
    scale_BN = jnp.maximum(joined.response_len, 1) if loss.length_normalised else jnp.ones_like(joined.response_len)
    logp_BN, ref_BN = sum_BN / scale_BN, ref_logp_BN / scale_BN
    valid_B = jnp.asarray(joined.prompt_len) > 0
    terms = {"loss": loss.preference(logp_BN[:, 0] - logp_BN[:, 1], ref_BN[:, 0] - ref_BN[:, 1], valid_B)}
    if loss.nll_coef:
        nll = chosen_nll_loss(sum_BN[:, 0], jnp.asarray(joined.response_len)[:, 0], valid_B)
        terms["loss/nll"] = Mean(loss.nll_coef * nll.total, nll.count)
    reward_BN = loss.beta * (logp_BN - ref_BN)
    metrics = {
        "rewards/chosen": Mean.of(reward_BN[:, 0], valid_B),
        "rewards/rejected": Mean.of(reward_BN[:, 1], valid_B),
        "rewards/accuracies": Mean.of(reward_BN[:, 0] > reward_BN[:, 1], valid_B),
        "rewards/margins": Mean.of(reward_BN[:, 0] - reward_BN[:, 1], valid_B),
        "logps/chosen": Mean.of(sum_BN[:, 0], valid_B),
        "logps/rejected": Mean.of(sum_BN[:, 1], valid_B),
        "tokens": (tokens.segment > 0).sum(),
    }
    return terms, metrics


@lru_cache
def make_step(model: Model, optim: OptimConfig, loss: DpoLoss, accumulation: int, mesh: Mesh) -> Any:
    """The jitted (state, batch, learning_rate) -> (state, metrics)."""
    return jax.jit(
        make_update(partial(objective, model, loss), optim, accumulation=accumulation),
        donate_argnums=0,
        out_shardings=(state_sharding(model, optim, mesh), replicated(mesh)),
    )


@lru_cache
def make_held_out(model: Model, loss: DpoLoss, mesh: Mesh) -> Any:
    """The jitted (params, batch) -> means on held-out rows."""
    return make_measure(partial(objective, model, loss), mesh)


def run(
    config: Config,
    mesh: Mesh,
    folder: Path,
    *,
    init: Artifact,
    reference: Artifact,
    pairs: Artifact | None = None,
    subset: Subset,
) -> dict[str, Any]:
    """Trains from `init` against `reference` and writes `model/`.

    Args:
      pairs: a selection; None for the human pairs as they are labelled (DPO-base).
      subset: which of the selection's pairs.
    """
    check_sizes(config, config.dpo.train, "dpo")
    train = config.dpo.train
    codec = TextCodec(load_tokenizer(init.model), config.text)
    if pairs is None:
        examples = _human_examples(config, codec, load_corpus(config).human_pairs(config.select.num_prompts))
    else:
        examples = _selected(config, codec, pairs, subset)
    held_out: list[Example] = []
    if train.eval_every is not None:
        # people's pairs, also where training has sampled ones: the same for all runs, with labels of their own
        held_out = _human_examples(config, codec, first_rows(load_corpus(config).held_out, train, "dpo"))
    examples, held_out = _with_reference(config, mesh, reference, examples, held_out)

    model, params = loading.load(init.model, config, mesh)
    loading.save_description(folder / "model", model, codec)
    loss = DpoLoss.of(config.dpo)
    measure = make_held_out(model, loss, mesh)
    params, trained = fit_examples(
        params,
        make_step(model, train.optim, loss, train.accumulation, mesh),
        examples,
        config=config,
        train=train,
        mesh=mesh,
        folder=folder,
        stage="dpo",
        evaluate=make_evaluate(measure, held_out, buckets=config.text.length_buckets, train=train, mesh=mesh),
    )
    loading.save(folder / "model", model, params, codec)
    return {"pairs": len(examples), **trained}


def _with_reference(config: Config, mesh: Mesh, reference: Artifact, *sets: list[Example]) -> list[list[Example]]:
    """The examples of each set with both log-probabilities under the reference, which then leaves memory.

    Each set has buckets of its own, so that what is computed of one does not depend on another.
    """
    model, params = loading.load(reference.model, config, mesh, frozen=True)
    logps = forward.make_response_logps(model, mesh)

    def measure(batch: PromptBatch) -> Any:
        return logps(params, place_batch(batch, mesh))

    def extended(examples: list[Example]) -> list[Example]:
        buckets = Buckets.of(examples, config.text.length_buckets)
        ref_BN = map_batches(examples, buckets, config.dpo.train.batch_size, measure, models=str(reference.model))
        pairs = zip(examples, ref_BN, strict=True)
        return [dataclasses.replace(example, extra=tuple(map(float, ref))) for example, ref in pairs]

    return [extended(examples) if examples else [] for examples in sets]


def _human_examples(config: Config, codec: TextCodec, rows: Sequence[Preference]) -> list[Example]:
    texts = [(row.prompt, (row.chosen, row.rejected)) for row in rows]
    return tokenize(codec, texts, cache=config.runtime.token_cache_folder)[0]


def _selected(config: Config, codec: TextCodec, pairs: Artifact, subset: Subset) -> list[Example]:
    """The selection's rows with the chosen side first; responses keep the ids that were sampled."""
    table = PairTable.read(pairs.path)
    rows = table.rows(subset, config.select)
    prompts, _ = tokenize(codec, [(table.prompt[row], ()) for row in rows], cache=config.runtime.token_cache_folder)
    examples = []
    for row, example in zip(rows, prompts, strict=True):
        chosen, ids = int(table.chosen[row]), table.ids[row]
        examples.append(Example(example.prompt, [ids[chosen], ids[1 - chosen]]))
    return examples
