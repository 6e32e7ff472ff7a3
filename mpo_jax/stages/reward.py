"""The reward model: a value head on the SFT trunk, Bradley-Terry on human pairs, prompt shared by both sides."""

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from mpo_jax.config.schema import Config, OptimConfig
from mpo_jax.data.batches import Buckets, map_batches
from mpo_jax.data.corpus import Corpus, base_tokenizer, load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import tokenize
from mpo_jax.errors import UserError
from mpo_jax.evaluation.calibration import accuracy_by_gap, against_truth, write_gaps
from mpo_jax.evaluation.verdicts import rate
from mpo_jax.losses import bradley_terry_loss, span_reward_loss
from mpo_jax.models import forward, loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf.hub import local_model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime.processes import is_main
from mpo_jax.runtime.seeds import stage_key
from mpo_jax.runtime.sharding import place_batch, replicated
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.training.loop import check_sizes, fit_examples, make_update, state_sharding
from mpo_jax.training.validation import first_rows, make_evaluate, make_measure
from mpo_jax.types import Artifact, Mean, Metrics, Params, PromptBatch


def objective(model: Model, loss: str, params: Params, batch: PromptBatch) -> tuple[Metrics, Metrics]:
    """Bradley-Terry on the last token's scores, or DeepSpeed-Chat's over the span where the sides differ."""
    tokens = forward.join(batch)
    score_BT = forward.scores(model, params, tokens)
    score_BN = forward.response_scores(score_BT, batch)
    chosen_B, rejected_B = score_BN[:, 0], score_BN[:, 1]
    valid_B = jnp.asarray(batch.prompt_len) > 0
    if loss == "ds_span":
        term = _span_term(score_BT, batch, valid_B)
    else:
        term = bradley_terry_loss(chosen_B, rejected_B, valid_B)
    metrics = {
        "accuracy": Mean.of(chosen_B > rejected_B, valid_B),
        "score/chosen": Mean.of(chosen_B, valid_B),
        "score/rejected": Mean.of(rejected_B, valid_B),
        "gap": Mean.of(chosen_B - rejected_B, valid_B),
        "tokens": (tokens.segment > 0).sum(),
    }
    return {"loss": term}, metrics


def _span_term(score_BT: Float[Array, "B T"], batch: PromptBatch, valid_B: Bool[Array, " B"]) -> Mean:
    """The span loss over response columns: the sides share the prompt, so they cannot differ before them."""
    P = batch.prompt.shape[1]
    score_BNS = rearrange(score_BT[:, P:], "b (n s) -> b n s", n=2)
    return span_reward_loss(score_BNS, jnp.asarray(batch.response), jnp.asarray(batch.response_len), valid_B)


@lru_cache
def make_step(model: Model, optim: OptimConfig, loss: str, accumulation: int, mesh: Mesh) -> Any:
    """The jitted (state, batch, learning_rate) -> (state, metrics)."""
    return jax.jit(
        make_update(partial(objective, model, loss), optim, accumulation=accumulation),
        donate_argnums=0,
        out_shardings=(state_sharding(model, optim, mesh, head="value"), replicated(mesh)),
    )


@lru_cache
def make_held_out(model: Model, loss: str, mesh: Mesh) -> Any:
    """The jitted (params, batch) -> means on held-out rows."""
    return make_measure(partial(objective, model, loss), mesh)


def run(config: Config, mesh: Mesh, folder: Path, *, sft: Artifact) -> dict[str, Any]:
    """Trains, or takes the finished model at `reward.path`; writes `model/` and `held_out.parquet`.

    Returns counts, held-out accuracy, and accuracy by gap against labels and truth; None where nothing is held out.
    """
    check_sizes(config, config.reward.train, "reward")
    corpus = load_corpus(config)
    codec = TextCodec(base_tokenizer(config), config.text)
    if config.reward.path is None:
        model, params, summary = _train(config, mesh, folder, sft, corpus, codec)
    else:
        model, params = _finished(config, mesh, codec)
        summary = {"path": config.reward.path, "data": [source.to_dict() for source in corpus.reports]}
    loading.save(folder / "model", model, params, codec)
    return summary | _measure(config, mesh, folder, model, params, corpus, codec)


def _train(
    config: Config, mesh: Mesh, folder: Path, sft: Artifact, corpus: Corpus, codec: TextCodec
) -> tuple[Model, Params, dict[str, Any]]:
    train = config.reward.train
    if config.reward.init == "sft":
        model, params = loading.load(sft.model, config, mesh)
    else:
        model, params = loading.load_base(config, codec, mesh, stage_key(config.seed, "init"))
    params = loading.with_value_head(model, params, mesh)
    loading.save_description(folder / "model", model, codec, head="value")
    rows = [(row.prompt, (row.chosen, row.rejected)) for row in corpus.reward_pairs]
    examples, report = tokenize(codec, rows, cache=config.runtime.token_cache_folder)
    held_out = first_rows(corpus.validation or corpus.held_out, train, "reward")
    rows = [(row.prompt, (row.chosen, row.rejected)) for row in held_out]
    measured, _ = tokenize(codec, rows, cache=config.runtime.token_cache_folder)
    measure = make_held_out(model, config.reward.loss, mesh)
    params, trained = fit_examples(
        params,
        make_step(model, train.optim, config.reward.loss, train.accumulation, mesh),
        examples,
        config=config,
        train=train,
        mesh=mesh,
        folder=folder,
        stage="reward",
        evaluate=make_evaluate(measure, measured, buckets=config.text.length_buckets, train=train, mesh=mesh),
    )
    sources = [source.to_dict() for source in corpus.reports]
    return model, params, {"data": sources, "tokens": report.to_dict(), **trained}


def _finished(config: Config, mesh: Mesh, codec: TextCodec) -> tuple[Model, Params]:
    """The reward model at `reward.path`, which must read the policy's token ids."""
    assert config.reward.path is not None
    source = loading.open_model(config.reward.path)
    if source.head != "value":
        raise UserError(f"reward.path={config.reward.path} is no reward model: it has no tensor score.weight")
    theirs = TextCodec(load_tokenizer(local_model(config.reward.path)), config.text)
    if theirs.tokenizer.get_vocab() != codec.tokenizer.get_vocab():
        raise UserError(
            f"reward.path={config.reward.path} has another tokenizer than the policy: their token ids differ, and the "
            "reward model would read other text than was written"
        )
    loading.check_vocabulary(codec, source.decoder, config.reward.path)
    return loading.load(config.reward.path, config, mesh, head="value")


def _measure(
    config: Config, mesh: Mesh, folder: Path, model: Model, params: Params, corpus: Corpus, codec: TextCodec
) -> dict[str, Any]:
    """Accuracy on the held-out pairs, against their labels and, where it is known, the truth; writes their gaps."""
    if not corpus.reward_test:
        return {"held_out_accuracy": None, "accuracy_by_gap": None}
    rows = [(row.prompt, (row.chosen, row.rejected)) for row in corpus.reward_test]
    held_out, _ = tokenize(codec, rows, cache=config.runtime.token_cache_folder)
    score = forward.make_score_pairs(model, mesh)
    score_BN = map_batches(
        held_out,
        Buckets.of(held_out, config.text.length_buckets),
        config.reward.train.batch_size,
        lambda batch: score(params, place_batch(batch, mesh)),
        models=config.reward.path or str(folder / "model"),
    )
    gap = score_BN[:, 0] - score_BN[:, 1]
    accuracy = rate(int((gap > 0).sum()), len(gap))
    assert accuracy is not None
    if accuracy.low <= 0.5:
        warn(
            f"the reward model orders {accuracy} (95% interval) of {len(gap)} held-out pairs as they are labelled. "
            "That does not beat chance: selection, PPO and rewards follow noise. Train it longer, on more pairs or "
            "from a larger model"
        )
    summary = {
        "held_out_accuracy": accuracy.value,
        "held_out_accuracy_interval": [accuracy.low, accuracy.high],
        "accuracy_by_gap": accuracy_by_gap(gap),
    }
    truth = None
    if corpus.utility is not None:
        truth = np.asarray(
            [corpus.utility(r.prompt, r.chosen) - corpus.utility(r.prompt, r.rejected) for r in corpus.reward_test]
        )
        decided = truth != 0
        summary["true_accuracy"] = float(((gap > 0) == (truth > 0))[decided].mean())
        summary["true_accuracy_by_gap"] = accuracy_by_gap(against_truth(gap, truth))
        summary["label_accuracy"] = float((truth > 0)[decided].mean())
    if is_main():
        write_gaps(folder, gap, truth, [row.category for row in corpus.reward_test])
    return summary
