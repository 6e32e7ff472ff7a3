"""The reward model: a scalar head on the SFT trunk, Bradley-Terry on human pairs, prompt shared by both sides."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mpo_jax.config import Config, OptimConfig
from mpo_jax.data.batches import Widths, map_batches, tokenize
from mpo_jax.data.corpus import base_tokenizer, load_corpus
from mpo_jax.evaluation.calibration import accuracy_by_gap
from mpo_jax.losses import bradley_terry_loss, span_reward_loss
from mpo_jax.model import functional, loading
from mpo_jax.model.functional import Model
from mpo_jax.runtime import stage_key
from mpo_jax.sharding import place_batch, replicated
from mpo_jax.text import TextCodec
from mpo_jax.train import check_sizes, fit_examples, make_update, state_sharding
from mpo_jax.types import Artifact, Joined, Mean, Metrics, Params


def objective(model: Model, loss: str, params: Params, batch: Joined) -> tuple[Metrics, Metrics]:
    """Bradley-Terry on the last token's scores, or DeepSpeed-Chat's over the span where the sides differ."""
    tokens = functional.join(batch)
    score_BT = functional.scores(model, params, tokens)
    score_BN = functional.response_scores(score_BT, batch)
    chosen_B, rejected_B = score_BN[:, 0], score_BN[:, 1]
    term = _span_term(score_BT, batch) if loss == "ds_span" else bradley_terry_loss(chosen_B, rejected_B)
    metrics = {
        "accuracy": Mean.of(chosen_B > rejected_B),
        "score/chosen": Mean.of(chosen_B),
        "score/rejected": Mean.of(rejected_B),
        "gap": Mean.of(chosen_B - rejected_B),
        "tokens": (tokens.segment > 0).sum(),
    }
    return {"loss": term}, metrics


def _span_term(score_BT: Float[Array, "B T"], batch: Joined) -> Mean:
    """The span loss over response columns: the sides share the prompt, so they cannot differ before them."""
    P = batch.prompt.shape[1]
    score_BNS = rearrange(score_BT[:, P:], "b (n s) -> b n s", n=2)
    return span_reward_loss(score_BNS, jnp.asarray(batch.response), jnp.asarray(batch.response_len))


@lru_cache
def make_step(model: Model, optim: OptimConfig, loss: str, accumulation: int, mesh: Mesh) -> Any:
    """The jitted (state, batch, learning_rate) -> (state, metrics)."""
    return jax.jit(
        make_update(partial(objective, model, loss), optim, accumulation=accumulation),
        donate_argnums=0,
        out_shardings=(state_sharding(model, optim, mesh, scalar=True), replicated(mesh)),
    )


def run(config: Config, mesh: Mesh, folder: Path, *, sft: Artifact) -> dict[str, Any]:
    """Trains, writes `model/`, and returns counts, held-out accuracy, and accuracy by gap against labels and truth."""
    check_sizes(config, config.reward.train, "reward")
    train = config.reward.train
    corpus = load_corpus(config.data)
    codec = TextCodec(base_tokenizer(config), config.text)
    if config.reward.init == "sft":
        model, params = loading.load(sft.model, config, mesh)
    else:
        model, params = loading.load_base(config, codec, mesh, stage_key(config.seed, "init"))
    params = loading.to_scalar(model, params, mesh)

    examples, report = tokenize(codec, [(row.prompt, (row.chosen, row.rejected)) for row in corpus.pairs])
    step = make_step(model, train.optim, config.reward.loss, train.accumulation, mesh)
    params, trained = fit_examples(
        params, step, examples, config=config, train=train, mesh=mesh, folder=folder, stage="reward"
    )
    loading.save(folder / "model", model, params, codec)

    held_out, _ = tokenize(codec, [(row.prompt, (row.chosen, row.rejected)) for row in corpus.held_out])
    score = functional.make_score_pairs(model, mesh)
    score_BN = map_batches(
        held_out, Widths.of(held_out), train.batch_size, lambda batch: score(params, place_batch(batch, mesh))
    )
    gap = score_BN[:, 0] - score_BN[:, 1]
    summary = {
        "data": [source.to_dict() for source in corpus.reports],
        "tokens": report.to_dict(),
        **trained,
        "held_out_accuracy": float((gap > 0).mean()),
        "accuracy_by_gap": accuracy_by_gap(gap),
    }
    if corpus.utility is not None:
        truth = np.asarray(
            [corpus.utility(r.prompt, r.chosen) - corpus.utility(r.prompt, r.rejected) for r in corpus.held_out]
        )
        decided = truth != 0
        summary["true_accuracy"] = float(((gap > 0) == (truth > 0))[decided].mean())
        summary["true_accuracy_by_gap"] = accuracy_by_gap(np.where(truth > 0, gap, -gap)[decided])
        summary["label_accuracy"] = float((truth > 0)[decided].mean())
    return summary
