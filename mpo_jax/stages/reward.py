"""The reward model: a value head on the SFT trunk, Bradley-Terry loss on human pairs, one shared prompt per pair."""

from collections.abc import Iterator, Mapping
from functools import lru_cache, partial
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from mpo_jax.config.base import InRecipe
from mpo_jax.config.schema import ArchitectureConfig, Config, OptimConfig, Section, TextConfig
from mpo_jax.data.reward_codec import RewardCodec
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import UserError
from mpo_jax.evaluation.accuracy import length_baseline
from mpo_jax.evaluation.calibration import accuracy_by_gap, against_truth, write_gaps
from mpo_jax.evaluation.verdicts import rate
from mpo_jax.losses import bradley_terry_loss, span_reward_loss
from mpo_jax.models import forward, loading, responses
from mpo_jax.models.forward import Model
from mpo_jax.models.hf.hub import local_model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime import machine
from mpo_jax.runtime.console import console
from mpo_jax.runtime.processes import is_main
from mpo_jax.runtime.sharding import check_batch
from mpo_jax.runtime.stage_warnings import warn
from mpo_jax.selection import ordered_right
from mpo_jax.stages.context import INPUTS, Context
from mpo_jax.stages.fitting import (
    calls,
    check_sizes,
    fit_examples,
    held_out_program,
    num_updates,
    reward_program,
    train_program,
    trained_model,
)
from mpo_jax.stages.packed import packing_in_order
from mpo_jax.stages.scorer import OwnTokens, Scorer, SharedTokens, by_function, open_model, own_codec
from mpo_jax.stages.settings import Adapting, Numerics, TrainSettings, adapter_of
from mpo_jax.stages.shapes import Shapes
from mpo_jax.stages.stage import Program, Stage
from mpo_jax.training.optimizer import make_optimizer
from mpo_jax.training.update import jit_update
from mpo_jax.training.validation import first_rows, make_evaluate, make_measure
from mpo_jax.types import Artifact, Mean, Metrics, Params, PromptBatch, Tree

Loss = Literal["last_token", "ds_span"]


class Training(Section, frozen=True):
    """How a reward model is trained.

    Attributes:
      architecture: sizes of the base model if training starts from one initialised from scratch; else None.
      adapter: None also if training starts from scratch.
    """

    init: Literal["sft", "base"]
    loss: Loss
    architecture: ArchitectureConfig | None
    adapter: Adapting = None
    train: TrainSettings


class Settings(Section, frozen=True):
    """Everything the reward model and its held-out metrics depend on, besides the rows and models that it reads.

    Attributes:
      batch_size: number of pairs per call in the held-out evaluation.
      training: how the model is trained; None if a finished model or a function is used.
      function: of Python, in place of a model.
      label: of a finished model, the label whose logit is the score; None: as `found.Scores` says.
    """

    seed: int
    text: TextConfig
    numerics: Numerics
    save_dtype: str
    batch_size: int
    training: Training | None
    function: Annotated[str | None, InRecipe.UNLESS_DEFAULT] = None
    label: Annotated[str | None, InRecipe.UNLESS_DEFAULT] = None

    @property
    def packed(self) -> bool:
        """Whether training rows are packed; not for `ds_span`, which reads scores of padding past the end of a side."""
        return self.text.packed and self.training is not None and self.training.loss != "ds_span"

    @classmethod
    def of(cls, config: Config) -> "Settings":
        reward, training = config.reward, None
        if reward.trains:
            scratch = reward.init == "base" and config.model.path is None
            architecture = config.model.architecture if scratch else None
            training = Training(
                init=reward.init,
                loss=reward.loss,
                architecture=architecture,
                adapter=adapter_of("reward", config),
                train=TrainSettings.of(reward.train),
            )
        return cls(
            seed=config.seed if reward.seed is None else reward.seed,
            text=config.text,
            numerics=Numerics.of(config.model),
            save_dtype=machine.save_dtype(config.runtime),
            batch_size=reward.train.batch_size,
            training=training,
            function=reward.function,
            label=None if reward.path is None else reward.label,
        )


def objective(model: Model, loss: Loss, tree: Tree, batch: responses.Rows) -> tuple[Metrics, Metrics]:
    """Bradley-Terry loss on last-token scores, or DeepSpeed-Chat's loss over the span where the sides differ.

    The latter needs padded rows: where one side has ended, it reads the scores of padding.
    """
    valid_B = responses.valid(batch)
    if loss == "ds_span":
        assert isinstance(batch, PromptBatch)
        score_BT = forward.scores(model, tree, forward.join(batch))
        score_BN = forward.response_scores(score_BT, batch)
        term = _span_term(score_BT, batch, valid_B)
    else:
        score_BN = responses.scores(model, tree, batch)
        term = bradley_terry_loss(score_BN[:, 0], score_BN[:, 1], valid_B)
    chosen_B, rejected_B = score_BN[:, 0], score_BN[:, 1]
    metrics = {
        "accuracy": Mean.of(jnp.asarray(ordered_right(chosen_B - rejected_B)), valid_B),
        "score/chosen": Mean.of(chosen_B, valid_B),
        "score/rejected": Mean.of(rejected_B, valid_B),
        "gap": Mean.of(chosen_B - rejected_B, valid_B),
        **responses.usage(batch),
    }
    return {"loss": term}, metrics


def _span_term(score_BT: Float[Array, "B T"], batch: PromptBatch, valid_B: Bool[Array, " B"]) -> Mean:
    """The span loss over response columns; the sides share the prompt, so they cannot differ earlier."""
    P = batch.prompt.shape[1]
    score_BNS = rearrange(score_BT[:, P:], "b (n s) -> b n s", n=2)
    return span_reward_loss(score_BNS, jnp.asarray(batch.response), jnp.asarray(batch.response_len), valid_B)


@lru_cache
def make_step(model: Model, optim: OptimConfig, loss: Loss, accumulation: int, mesh: Mesh) -> Any:
    """The jitted (state, batch, frozen) -> (state, metrics)."""
    trainable = forward.abstract_split(model, head="value")["trainable"]
    return jit_update(
        partial(objective, model, loss), make_optimizer(optim), trainable, mesh, accumulation=accumulation
    )


@lru_cache
def make_held_out(model: Model, loss: Loss, mesh: Mesh) -> Any:
    """The jitted (params, batch) -> metric means on held-out rows."""
    return make_measure(partial(objective, model, loss), mesh)


def check(settings: Settings, mesh: Mesh) -> None:
    """Raises UserError if a batch does not divide over the mesh: of the update, or of the held-out pairs."""
    if settings.training is not None:
        check_sizes("reward", settings.training.train, mesh)
    else:
        check_batch(settings.batch_size, mesh, "reward.train.batch_size")


def run(settings: Settings, parents: Mapping[str, Artifact], context: Context) -> dict[str, Any]:
    """Trains a reward model, loads a finished one, or calls a function; writes `model/` and `held_out.parquet`.

    A function has no `model/`.

    Returns row counts, held-out accuracy, and accuracy by gap against labels and truth (None if nothing is held out).
    """
    codec = TextCodec(context.inputs.tokenizer, settings.text)
    check(settings, context.mesh)
    folder, of = context.folder / "model", None
    summary: dict[str, Any] = {"data": [source.to_dict() for source in context.inputs.corpus.reports]}
    if context.inputs.reward_function is not None:
        scorer = by_function(context, codec)
        summary["function"] = settings.function
    elif (path := context.inputs.reward_model) is not None:
        scorer = _finished(path, settings, context, codec)
        summary["path"] = path
        shared = isinstance(scorer, SharedTokens)
        tokenizer = codec.tokenizer if shared else scorer.codec.tokenizer
        loading.save(folder, scorer.model, scorer.params, tokenizer, dtype=settings.save_dtype, scored_at_end=shared)
    else:
        assert settings.training is not None
        base = _base(settings.training, parents["sft"], context)
        model, params, trained = _train(settings, settings.training, parents["sft"], context, codec)
        loading.save(folder, model, params, codec.tokenizer, dtype=settings.save_dtype, base=base, scored_at_end=True)
        scorer, of = SharedTokens(context, model, params, settings.text, str(folder)), trained_model(params)
        summary |= trained
    return summary | _measure(settings, context, scorer, codec, of)


def _base(training: Training, sft: Artifact, context: Context) -> str | None:
    """What training starts from, as a path; None if it starts from scratch."""
    return str(sft.model) if training.init == "sft" else context.inputs.base


def _train(
    settings: Settings, training: Training, sft: Artifact, context: Context, codec: TextCodec
) -> tuple[Model, Params, dict[str, Any]]:
    train, corpus = training.train, context.inputs.corpus
    adapted: dict[str, Any] = {"adapter": training.adapter, "new_head": True}
    if training.init == "sft":
        model, params = context.load_to_train(
            "reward", sft.model, settings.numerics, settings.text, seed=settings.seed, **adapted
        )
    else:
        model, params = context.load_base(
            "reward", settings.numerics, codec, training.architecture, settings.seed, **adapted
        )
    loading.save_description(
        context.folder / "model", model, codec.tokenizer, head="value", dtype=settings.save_dtype,
        base=_base(training, sft, context), scored_at_end=True,
    )  # fmt: skip
    rows = [(row.prompt, (row.chosen, row.rejected)) for row in corpus.reward_pairs]
    examples, report = context.tokenize(codec, rows, of="pairs")
    for message in report.findings("pairs", settings.text.max_response_tokens):
        warn(message)
    held_out = first_rows(corpus.validation or corpus.held_out, context.watch, "reward")
    measured, _ = context.tokenize(codec, [(row.prompt, (row.chosen, row.rejected)) for row in held_out])
    params, trained = fit_examples(
        "reward",
        params,
        make_step(model, train.optim, training.loss, train.accumulation, context.mesh),
        examples,
        seed=settings.seed,
        buckets=settings.text.length_buckets,
        train=train,
        context=context,
        model=model,
        head="value",
        packed=settings.packed,
        evaluate=make_evaluate(
            make_held_out(model, training.loss, context.mesh),
            measured,
            buckets=settings.text.length_buckets,
            batch_size=train.batch_size if settings.packed else train.batch_size // train.accumulation,
            mesh=context.mesh,
            packing=packing_in_order(measured, train, context.mesh) if settings.packed else None,
        ),
    )
    return model, params, {"tokens": report.to_dict(), **trained}


def _finished(path: str, settings: Settings, context: Context, codec: TextCodec) -> SharedTokens | OwnTokens:
    """The reward model at `reward.path`."""
    return open_model(
        context, path, codec, settings.numerics, own=check_finished(path, codec, settings.label), label=settings.label
    )


def check_finished(path: str, codec: TextCodec, label: str | None = None) -> RewardCodec | None:
    """Checks a finished reward model, without its weights.

    Args:
      label: the value of reward.label.

    Returns:
      How text becomes its tokens, if they are not the policy's.

    Raises:
      UserError: if there is none, or its architecture, head, length or tokenizer does not do for this policy.
    """
    with loading.naming("reward.path", path):
        source = loading.open_model(path, label=label)
    if source.head != "value":
        raise UserError(
            f"reward.path={path} is not a reward model: it has no tensor score.weight (or v_head or value_head)"
        )
    with loading.naming("reward.path", path):
        theirs = load_tokenizer(local_model(path))
        own = own_codec(theirs, source, codec, f"reward.path={path}")
        if own is None:
            loading.check_source(source, codec.vocab_size, codec.config, head="value")
        else:
            loading.check_source(source, own.vocab_size, None, head="value")
    return own


def _measure(
    settings: Settings, context: Context, scorer: Scorer, codec: TextCodec, of: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Accuracy on the held-out pairs against their labels and, if known, the truth; writes their gaps."""
    corpus = context.inputs.corpus
    if not corpus.reward_test:
        return {"held_out_accuracy": None, "accuracy_by_gap": None}
    rows = [(row.prompt, (row.chosen, row.rejected)) for row in corpus.reward_test]
    held_out, _ = context.tokenize(codec, rows)
    prompts = [prompt for prompt, _ in rows]
    score_BN = scorer.scores("reward", "held-out", prompts, held_out, batch_size=settings.batch_size, of=of)
    gap = score_BN[:, 0] - score_BN[:, 1]
    accuracy = rate(float(ordered_right(gap).sum()), len(gap))
    assert accuracy is not None
    if accuracy.low <= 0.5:
        advice = "Train it longer, on more pairs or from a larger model"
        what = ("reward model", advice) if settings.function is None else ("reward function", "Check what it returns")
        warn(
            f"the {what[0]} orders {accuracy} (95% interval) of {len(gap)} held-out pairs as they are labelled. "
            f"That does not beat chance: selection, PPO and rewards follow noise. {what[1]}"
        )
    if ties := int((gap == 0).sum()):
        console.print(f"  {ties} of {len(gap)} held-out pairs tie: each counts as half right", soft_wrap=True)
    summary = {
        "held_out_accuracy": accuracy.value,
        "held_out_accuracy_interval": [accuracy.low, accuracy.high],
        "longer_is_chosen": length_baseline([(row.chosen, row.rejected) for row in corpus.reward_test]).mean,
        "accuracy_by_gap": accuracy_by_gap(gap),
    }
    truth = None
    if corpus.utility is not None:
        truth = np.asarray(
            [corpus.utility(r.prompt, r.chosen) - corpus.utility(r.prompt, r.rejected) for r in corpus.reward_test]
        )
        decided = truth != 0
        summary["true_accuracy"] = float(ordered_right(against_truth(gap, truth)).mean())
        summary["true_accuracy_by_gap"] = accuracy_by_gap(against_truth(gap, truth))
        summary["label_accuracy"] = float((truth > 0)[decided].mean())
    if is_main():
        write_gaps(context.folder, gap, truth, [row.category for row in corpus.reward_test])
    return summary


def programs(settings: Settings, shapes: Shapes) -> Iterator[Program]:
    """The update and held-out metrics, if the model is trained, and the scoring of held-out pairs."""
    amounts, rows = shapes.amounts, shapes.rows(settings.batch_size, 2)
    check(settings, shapes.mesh)
    if settings.training is not None:
        train, loss = settings.training.train, settings.training.loss
        updates = None if amounts is None else num_updates(train, amounts.reward_pairs)
        batch = partial(shapes.packed, train=train) if settings.packed else shapes.batch
        yield train_program(
            "reward", "step", make_step(shapes.model, train.optim, loss, train.accumulation, shapes.mesh),
            (shapes.state(train.optim, "value"), batch(rows), shapes.trained("value")["frozen"]), shapes, rows,
            "value", accumulation=train.accumulation, runs=updates, lengths=shapes.lengths("pairs"),
        )  # fmt: skip
        yield from held_out_program(
            "reward", make_held_out(shapes.model, loss, shapes.mesh), batch, shapes, 2, "value", train=train,
            updates=updates, num_rows=None if amounts is None else amounts.reward_watched, packed=settings.packed,
            held=(shapes.state(train.optim, "value").opt_state,), lengths=shapes.lengths("pairs"),
        )  # fmt: skip
    yield from reward_program(
        "reward", shapes, settings.batch_size, 2, masters=True,
        runs=None if amounts is None else calls(amounts.reward_test, settings.batch_size),
        lengths=shapes.lengths("pairs"),
    )  # fmt: skip


STAGE = Stage("reward", Settings, ("sft",), INPUTS, run, programs, check, trains=True)
