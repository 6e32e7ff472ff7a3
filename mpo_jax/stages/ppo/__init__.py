"""Proximal policy optimisation on prompts, with a KL penalty to a reference and a separate critic model.

Sources: arXiv:1707.06347, arXiv:2009.01325, DeepSpeed-Chat.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from mpo_jax.data.batches import Buckets, TrainBatches
from mpo_jax.data.text import TextCodec
from mpo_jax.data.tokens import number_visits
from mpo_jax.errors import UserError
from mpo_jax.models import loading
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.runtime.console import console
from mpo_jax.runtime.offload import to_devices
from mpo_jax.runtime.seeds import data_seed
from mpo_jax.stages.context import Context
from mpo_jax.stages.fitting import check_rows, check_schedule, fit_stage, num_updates
from mpo_jax.stages.ppo.held_out import exported, make_evaluate
from mpo_jax.stages.ppo.iteration import Loop, Models, PpoState, init_ppo_state
from mpo_jax.stages.ppo.layout import packing_for
from mpo_jax.stages.ppo.programs import check, offloaded, programs
from mpo_jax.stages.ppo.settings import Settings
from mpo_jax.stages.scorer import open_text_scorer
from mpo_jax.stages.stage import Stage
from mpo_jax.stages.subset import read_subset
from mpo_jax.stages.widths import few_widths
from mpo_jax.types import Artifact, Head, Metrics, Params, frozen


def run(settings: Settings, parents: Mapping[str, Artifact], context: Context) -> dict[str, Any]:
    """Trains the actor from `init` against `reference` and writes `model/` and, if asked for, `critic/`.

    Parents: `init`; `reference`; `reward`, which scores responses and initialises the critic; `pairs`, a selection that
    supplies the prompts (absent: all training prompts). Where scores come from text, by a reward model of other tokens
    or a function, the critic starts from `init` with a value head of zeros.
    """
    method, train, mesh = settings.method, settings.train, context.mesh
    init = parents["init"]
    check(settings, mesh)
    codec, offload = TextCodec(load_tokenizer(init.model), settings.text), context.offload
    text = settings.text
    scorer = open_text_scorer(context, parents["reward"], codec, settings.numerics)
    models, actor, critic = _load(settings, parents, context, score_text=scorer is not None)
    actor_model, reward_model = models.actor, models.critic

    dtype = settings.save_dtype
    loading.save_description(context.folder / "model", actor_model, codec.tokenizer, dtype=dtype, base=str(init.model))
    if settings.save_critic:
        loading.save_description(context.folder / "critic", reward_model, codec.tokenizer, head="value", dtype=dtype)

    prompts = _prompts(settings, parents.get("pairs"), context)
    examples = number_visits(context.tokenize(codec, [(prompt, ()) for prompt in prompts])[0])
    buckets, size = Buckets.of(examples, text.length_buckets), train.batch_size
    iterations, warmup = num_updates(train, len(examples)), method.extras.critic_warmup
    if warmup >= iterations:
        raise UserError(
            f"ppo.extras.critic_warmup={warmup} leaves the actor none of the {iterations} "
            "iterations: lower it, or train longer with ppo.train.epochs or ppo.train.steps"
        )
    batches = TrainBatches(examples, buckets, size, data_seed(settings.seed, "ppo"), train.shuffle)
    demonstrations = _demonstrations(settings, codec, context) if method.extras.ptx_coef else None
    check_rows("ppo", len(examples), size)
    check_schedule("ppo.train.optim", method.actor_optim, (iterations - warmup) * method.updates)
    if warmup or method.critic_optim.warmup_steps != method.actor_optim.warmup_steps:
        # else there is nothing to say of the critic that was not said of the actor
        check_schedule("ppo.critic_optim", method.critic_optim, iterations * method.updates)
    packing = packing_for(settings, batches, mesh)
    loop = Loop(
        settings, mesh, codec, models, offload, iterations, context.watch.log_every, context.inputs.utility, scorer,
        packing,
    )  # fmt: skip

    def step(state: PpoState, batch: Any) -> tuple[PpoState, Metrics, Any]:
        return loop.iteration(state, batch, demonstrations, [prompts[number] for number in batch.example])

    # reference and reward model were loaded on their own, so nothing else refers to these arrays
    state = init_ppo_state(method, actor, critic, mesh, offload, donate=True)
    del actor, critic
    if packing is None and (narrower := few_widths(text.max_response_tokens)[:-1]):
        listed = ", ".join(map(str, narrower))
        console.print(f"  scoring and updates compile once more for each of {listed} response columns that comes up")
    state, trained = fit_stage(
        "ppo",
        state,
        step,
        batches,
        steps=iterations,
        train=train,
        context=context,
        evaluate=make_evaluate(loop, context, buckets, size),
        warmup=warmup,
        # programs are listed for one model, so nothing is said where the reward model has other sizes
        model=actor_model if actor_model == reward_model else None,
        eos_id=codec.ends,
        packing=packing,
    )
    loading.save(
        context.folder / "model", actor_model, exported(state, loop), codec.tokenizer, dtype=dtype, base=str(init.model)
    )
    if settings.save_critic:
        trained_critic = {"trainable": state.critic.trainable, "frozen": to_devices(models.critic_frozen)}
        loading.save(context.folder / "critic", reward_model, trained_critic, codec.tokenizer, dtype=dtype)
    return {"prompts": len(examples), **trained}


def _load(
    settings: Settings, parents: Mapping[str, Artifact], context: Context, *, score_text: bool
) -> tuple[Models, Params, Params]:
    """The four models, and what the states of actor and critic begin with.

    With adapters the reward model is the critic without its adapter, and the reference the actor without its own where
    both come from one artifact; they then share every array but the value head.

    Args:
      score_text: whether scores come from text; there is then no reward model that the critic could start from.
    """
    init, reference, reward = (parents[role] for role in ("init", "reference", "reward"))
    numerics, text, adapted = settings.numerics, settings.text, settings.adapter is not None

    def load_frozen(artifact: Artifact, head: Head) -> Params:
        return context.offload.frozen_params(context.load(artifact.model, numerics, text, head=head, frozen=True)[1])

    reference_params = frozen({}) if adapted and reference.id == init.id else load_frozen(reference, "lm")
    reward_params = None if adapted or score_text else load_frozen(reward, "value")
    training: dict[str, Any] = {"adapter": settings.adapter, "seed": settings.seed}
    actor_model, actor = context.load_to_train("ppo", init.model, numerics, text, **training)
    if score_text:
        console.print("  the critic starts from the policy with a value head of zeros, since scores come from text")
        reward_params, head = frozen({}), {"new_head": True}
    else:
        head = {"head": "value"}
    start = (init if score_text else reward).model
    reward_model, critic = context.load_to_train("ppo critic", start, numerics, text, **head, **training)
    if reward_params is None:
        # a copy, since the critic's own head trains
        reward_params = frozen({"score": jax.tree.map(jnp.copy, critic["trainable"]["score"])})
    resting = context.offload.frozen_params(frozen(critic["frozen"]))["frozen"]
    models = Models(actor_model, reward_model, actor["frozen"], resting, reference_params, reward_params)
    return models, actor, critic


def _prompts(settings: Settings, pairs: Artifact | None, context: Context) -> list[str]:
    if pairs is None:
        return context.inputs.corpus.sampled_prompts(settings.split.num_prompts)
    table, rows = read_subset(pairs, settings.split)
    prompts = [table.prompt[row] for row in rows]
    return list(dict.fromkeys(prompts)) if settings.samples_once else prompts


def _demonstrations(settings: Settings, codec: TextCodec, context: Context) -> TrainBatches:
    rows = context.inputs.corpus.demonstrations
    examples, _ = context.tokenize(codec, [(row.prompt, (row.response,)) for row in rows])
    buckets, train = Buckets.of(examples, settings.text.length_buckets), settings.train
    return TrainBatches(examples, buckets, train.batch_size, data_seed(settings.seed, "ptx"), train.shuffle)


__all__ = ["STAGE", "Settings", "offloaded"]

STAGE = Stage(
    "ppo",
    Settings,
    ("init", "reference", "pairs", "reward"),
    frozenset({"data", "reward_function"}),
    run,
    programs,
    check,
    trains=True,
)
