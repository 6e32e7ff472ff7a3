"""Trainers: an objective, an optax transformation and a state, with the compiled step of the stage of the same name."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, get_args

import jax
import optax

from mpo_jax.config.registry import PREFERENCE_LOSSES
from mpo_jax.config.schema import DpoConfig
from mpo_jax.config.suggestion import suggest
from mpo_jax.data.batches import Batch
from mpo_jax.errors import UserError
from mpo_jax.models import forward, loading
from mpo_jax.runtime.sharding import place_batch
from mpo_jax.stages import dpo, reward, sft
from mpo_jax.stages.dpo import DpoBatch
from mpo_jax.stages.preference import PreferenceLoss
from mpo_jax.tools.api.arguments import checked
from mpo_jax.tools.api.models import LoadedModel, check_rows, check_same_tokens
from mpo_jax.training.tracker import add_up, mean_values
from mpo_jax.training.update import Objective, init_state, jit_update
from mpo_jax.types import Params, PromptBatch, TrainState


class Measures(Mapping[str, float]):
    """A step's metrics, kept on the devices until one is read, so a loop need not wait for them."""

    def __init__(self, metrics: Mapping[str, Any]):
        self._metrics: Any = metrics
        self._values: dict[str, float] | None = None

    def _read(self) -> dict[str, float]:
        if self._values is None:
            self._values, self._metrics = mean_values(add_up([jax.device_get(self._metrics)], {})), None
        return self._values

    def __getitem__(self, name: str) -> float:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return repr(self._read())


@dataclasses.dataclass
class Trainer:
    """Trains a model on an objective.

    Attributes:
      start: initial model; its parameters are not modified.
      state: current training state; after `fitted = fit(trainer.state, trainer.update, batches)` set it to
        `fitted.state`, since a step donates the state that it is given.
      compiled: jitted function (state, batch, frozen) -> (state, metrics).
      prepare: function from a batch on the mesh to the objective's input.
      num_responses: responses that each row must have; None: any number.
    """

    start: LoadedModel
    state: TrainState
    compiled: Callable[..., Any]
    prepare: Callable[[PromptBatch], Any] = lambda rows: rows
    num_responses: int | None = None

    def step(self, batch: Batch | PromptBatch) -> Measures:
        """Makes one update; if the loss or gradient is not finite, it is skipped and counted as `skipped`."""
        self.state, metrics = self.update(self.state, batch)
        return Measures(metrics)

    def update(self, state: TrainState, batch: Batch | PromptBatch) -> tuple[TrainState, Any]:
        """The step as a function of the state, which is donated; for `fit` or a custom loop."""
        rows = batch.rows if isinstance(batch, Batch) else batch
        mesh = self.start.mesh
        check_rows(rows, self.start, num_responses=self.num_responses)
        with jax.set_mesh(mesh):
            return self.compiled(state, self.prepare(place_batch(rows, mesh)), self.start.params["frozen"])

    @property
    def params(self) -> Params:
        """The trained parameters; the next step donates their memory, so save or copy them first."""
        return {"trainable": self.state.trainable, "frozen": self.start.params["frozen"]}

    @property
    def policy(self) -> LoadedModel:
        """The trained model; like `params`, valid until the next step."""
        return self.start.with_params(self.params)


def train(
    model: LoadedModel,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulation: int = 1,
    prepare: Callable[[PromptBatch], Any] = lambda rows: rows,
    num_responses: int | None = None,
) -> Trainer:
    """A trainer for any objective (tree, batch) -> (terms, metrics) with any optax transformation.

    Args:
      accumulation: number of micro-batches per update.
      prepare: function from a batch on the mesh to the objective's input.
      num_responses: responses that each row must have; None: any number.

    Raises:
      UserError: if the model is frozen.
    """
    check_trains(model)
    trainable = model.params["trainable"]
    if accumulation < 1:
        raise UserError(f"accumulation={accumulation} must be at least 1")
    with jax.set_mesh(model.mesh):
        state = init_state(model.params, optimizer, model.mesh)
        compiled = jit_update(objective, optimizer, trainable, model.mesh, accumulation=accumulation)
    return Trainer(model, state, compiled, prepare, num_responses)


def check_trains(model: LoadedModel) -> None:
    """Raises UserError if the model has no parameters that train."""
    if not model.params["trainable"]:
        raise UserError("the model is frozen: load it with frozen=False to train it")


def Sft(model: LoadedModel, *, optimizer: optax.GradientTransformation, accumulation: int = 1) -> Trainer:
    """Supervised fine-tuning on rows with one response; the loss is its NLL in nats per token, EOS included."""
    model.check_head("lm", "model")
    return train(model, partial(sft.objective, model.model), optimizer, accumulation=accumulation, num_responses=1)


def Reward(
    model: LoadedModel,
    *,
    optimizer: optax.GradientTransformation,
    loss: reward.Loss = "last_token",
    accumulation: int = 1,
) -> Trainer:
    """A reward model on pairs: a zero-initialised value head on the language model's trunk, Bradley-Terry loss.

    Args:
      model: language model, or reward model to train further.
      loss: "last_token" for the scores of the last tokens, or "ds_span" for DeepSpeed-Chat's loss over the tokens where
        the sides differ.
    """
    check_trains(model)
    if loss not in get_args(reward.Loss):
        raise UserError(f"loss={loss!r} is no reward loss{suggest(loss, list(get_args(reward.Loss)))}")
    if model.head == "lm":
        with jax.set_mesh(model.mesh):
            model = model.with_params(loading.with_value_head(model.model, model.params, model.mesh))
    model = dataclasses.replace(model, scored_at_end=True)
    return train(
        model, partial(reward.objective, model.model, loss), optimizer, accumulation=accumulation, num_responses=2
    )


def Dpo(
    policy: LoadedModel,
    *,
    optimizer: optax.GradientTransformation,
    beta: float = 0.1,
    loss: str = "dpo",
    loss_options: Mapping[str, float] | None = None,
    length_normalised: bool = False,
    nll_coef: float = 0.0,
    reference: LoadedModel | None = None,
    accumulation: int = 1,
) -> Trainer:
    """Direct preference optimisation on pairs, the chosen response first. arXiv:2305.18290.

    Args:
      beta: strength of the pull towards the reference.
      loss: name of a registered loss: dpo, cdpo, ipo, simpo or your own.
      loss_options: options of the loss, by name.
      length_normalised: whether log-probabilities are first divided by response length.
      nll_coef: weight of the chosen response's NLL per token.
      reference: reference model; None: the initial policy.
    """
    policy.check_head("lm", "policy")
    if loss not in PREFERENCE_LOSSES:
        raise UserError(f"loss={loss!r} is no preference loss{suggest(loss, [*PREFERENCE_LOSSES])}")
    # options that are keys of `dpo` themselves have that key's bounds
    options = dict(loss_options or {})
    shared = {name: options.pop(name) for name in ("label_smoothing",) if name in options}
    given = {"loss": loss, "beta": beta, "loss_options": options, "nll_coef": nll_coef, **shared}
    settings = checked(DpoConfig, given | {"length_normalised": length_normalised})
    preference = PreferenceLoss.of(settings)
    reference = policy if reference is None else reference
    reference.check_head("lm", "reference")
    check_same_tokens(policy.tokenizer, reference.tokenizer, "policy and reference")
    logps = forward.make_response_logps(reference.model, policy.mesh)

    def prepare(rows: PromptBatch) -> DpoBatch:
        return DpoBatch(rows, logps(reference.params, rows) if preference.needs_reference else None)

    objective = partial(dpo.objective, policy.model, preference, nll_coef)
    return train(policy, objective, optimizer, accumulation=accumulation, prepare=prepare, num_responses=2)
