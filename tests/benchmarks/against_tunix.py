"""Times mpo_jax against Tunix's trainers and sampler on the CPU: equal weights, rows, threads and machine.

    bash launch/setup.sh
    python3 -m venv .venv-tunix
    .venv-tunix/bin/python -m pip install google-tunix==0.1.7 "jax==0.10.2"      # the JAX that mpo_jax runs on
    .venv/bin/python tests/benchmarks/against_tunix.py --tunix-python .venv-tunix/bin/python [--only sft] [--rounds 5]

Written for Tunix 0.1.7, which asks for libraries of its own: hence two environments. Prints a Markdown table; inputs,
processes and turns are those of against_torch.py, and so is what a step is. Tunix's Llama turns by a RoPE base of 1e6
whatever its configuration says, so that the model of both sides has that one.

What Tunix is given: float32, its trainers' own loops, losses and metrics in memory, a mesh of the one device, no
checkpoints, no rematerialisation, optax's adamw after clip_by_global_norm. Its losses of SFT and DPO are mpo_jax's:
nats per response token, and the mean of -log sigmoid(0.1 * margin) without label smoothing; three steps must agree.

Sampling: Tunix's sampler takes text and gives text, so tokenizing and decoding are timed with it.

PPO: what must agree is scores and log-probabilities of 8 fixed rows, as rollouts are drawn. Both make four passes over
the rollouts (policy, reference, critic, reward model) and one update of policy and critic, clipped and with AdamW each;
with ppo.one_pass the first and the third are mpo_jax's update. Tunix whitens advantages, estimates the KL by
exp(-d) + d - 1 unless told otherwise (here: by d, as mpo_jax does), and adds the score to a reward of whole numbers,
which cuts off its fraction. Its Llama cannot be a critic or a reward model as it comes, because those are called with
segment ids that it does not take: here they stand inside a module that drops them.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from peers import (
    EOS,
    GREEDY_TOKENS,
    HEAD_DIM,
    HEADS,
    LAYERS,
    LENGTH,
    PAD,
    PAIRS,
    ROLLOUTS,
    ROWS,
    SAMPLED_PROMPT,
    UNK,
    WORK,
    Channel,
    Peer,
    benchmark,
    read_rows,
    versions,
)
from tunix_trainers import (
    ROPE_THETA,
    load_judge,
    load_model,
    load_tokenizer,
    make_cluster,
    make_learner,
    make_optimizer,
    wait_for,
)


def tunix_worker(work: str, folder: Path, channel: Channel) -> None:
    import jax

    channel.about = versions("google-tunix", "jax", "jaxlib", "flax")
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        if work.startswith("sample"):
            sampling(WORK[work][1], folder, channel)
        elif work.startswith("ppo"):
            ppo(folder, channel, mesh)
        else:
            training(work, folder, channel)


def _ids(tokenizer: Any, texts: list[str], *, end: bool) -> np.ndarray:
    return np.asarray([tokenizer.encode(text) + [EOS] * end for text in texts], np.int32)


def _held_up(channel: Channel, batches: list[Any], finished: Callable[[], float]) -> Iterator[Any]:
    """The batches, endlessly, for a trainer that asks for one before each of its steps: given when a step is wanted.

    `finished` waits for the step and gives its value.
    """
    k = 0
    while True:
        channel.next()
        begin = time.perf_counter()
        yield batches[k % len(batches)]
        k += 1
        value = finished()
        channel.done(time.perf_counter() - begin, value)


def training(work: str, folder: Path, channel: Channel) -> None:
    import jax
    from flax import nnx

    tokenizer, size = load_tokenizer(folder), WORK[work][1]
    rows = read_rows(folder)[: ROWS if work == "sft" else PAIRS]
    prompts = _ids(tokenizer, [row["prompt"] for row in rows], end=False)
    chosen, rejected = (_ids(tokenizer, [row[side] for row in rows], end=True) for side in ("chosen", "rejected"))
    parts = [slice(begin, begin + size) for begin in range(0, len(rows), size)]
    if work == "sft":
        trainer, batches = _sft(folder), [_demonstrations(prompts[part], chosen[part]) for part in parts]
    else:
        trainer, batches = _dpo(folder), [_pairs(prompts[part], chosen[part], rejected[part]) for part in parts]
    losses: list[Any] = []
    process = trainer._post_process_train_step

    # what a trainer logs comes a step late
    def kept(aux: Any) -> None:
        losses.append(trainer._buffered_train_metrics.losses[-1])
        process(aux)

    trainer._post_process_train_step = kept

    def finished() -> float:
        jax.block_until_ready(nnx.state(trainer.model))
        return float(losses.pop())

    channel.ready([])
    trainer.train(_held_up(channel, batches, finished))


def _sft(folder: Path) -> Any:
    from tunix.sft import peft_trainer, utils

    def inputs(batch: Any) -> dict[str, Any]:
        real = batch.input_tokens != PAD
        return {
            "input_tokens": batch.input_tokens, "input_mask": batch.input_mask,
            "positions": utils.build_positions_from_mask(real), "attention_mask": utils.make_causal_attn_mask(real),
        }  # fmt: skip

    # the rows to evaluate on, of which there are none, are asked for every so many steps
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**6)
    return peft_trainer.PeftTrainer(load_model(folder), make_optimizer(), config).with_gen_model_input_fn(inputs)


def _demonstrations(prompts: np.ndarray, responses: np.ndarray) -> Any:
    from tunix.sft.peft_trainer import TrainingInput

    tokens = np.concatenate([prompts, responses], 1)
    return TrainingInput(tokens, np.concatenate([np.zeros_like(prompts), np.ones_like(responses)], 1))


def _dpo(folder: Path) -> Any:
    from tunix.sft.dpo.dpo_trainer import DPOTrainer, DPOTrainingConfig

    config = DPOTrainingConfig(eval_every_n_steps=10**6, beta=0.1)
    return DPOTrainer(load_model(folder), load_model(folder), make_optimizer(), config)


def _pairs(prompts: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> Any:
    from tunix.sft.dpo.dpo_trainer import TrainingInput

    real = np.ones((len(prompts), LENGTH), np.int32)
    return TrainingInput(prompts, real, chosen, real, rejected, real)


def sampling(batch_size: int, folder: Path, channel: Channel) -> None:
    from tunix.generate.sampler import CacheConfig, Sampler

    ids = np.load(folder / "prompts.npy")[:batch_size]
    prompts = ["".join(f" w{token}" for token in row) for row in ids]
    cache = CacheConfig(
        cache_size=SAMPLED_PROMPT + LENGTH, num_layers=LAYERS, num_kv_heads=HEADS, head_dim=HEAD_DIM
    )  # fmt: skip
    sampler = Sampler(load_model(folder), load_tokenizer(folder), cache)

    def drawn(tokens: int, **options: Any) -> np.ndarray:
        lengths = {"max_generation_steps": tokens, "max_prompt_length": SAMPLED_PROMPT}
        return np.asarray(sampler(prompts, **lengths, forbidden_tokens=(PAD, UNK, EOS), **options).tokens)

    channel.ready(drawn(GREEDY_TOKENS).ravel().tolist())
    seeds = iter(range(10**6))

    def step() -> Callable[[], float]:
        seed = next(seeds)
        return lambda: drawn(LENGTH, temperature=1.0, top_p=1.0, seed=seed).size

    channel.repeat(step)


def ppo(folder: Path, channel: Channel, mesh: Any) -> None:
    import jax.numpy as jnp
    from flax import nnx
    from tunix.rl import common

    tokenizer, rows = load_tokenizer(folder), read_rows(folder)
    actor, reference = load_model(folder), load_model(folder)
    critic, reward = load_judge(folder), load_judge(folder)
    first = rows[:ROLLOUTS]
    prompt = jnp.asarray(_ids(tokenizer, [row["prompt"] for row in first], end=False))
    chosen = jnp.asarray(_ids(tokenizer, [row["chosen"] for row in first], end=True))
    scores = common.compute_score(reward, prompt, chosen, PAD, EOS)[:, -1]
    logps = common.compute_per_token_logps(*nnx.split(actor), prompt, chosen, PAD, EOS).sum(-1)

    models = {"actor": actor, "reference": reference, "critic": critic, "reward": reward}
    cluster = make_cluster(folder, mesh, models, prompt=LENGTH, response=LENGTH)
    learner = make_learner(cluster)
    texts = np.asarray([row["prompt"] for row in rows])
    batches = [{"prompts": texts[begin : begin + ROLLOUTS]} for begin in range(0, ROWS, ROLLOUTS)]

    def finished() -> float:
        wait_for(cluster)
        return 0.0

    channel.ready([float(x) for x in (*scores, *logps)])
    learner.train(_held_up(channel, batches, finished))


if __name__ == "__main__":
    works = ("sft", "dpo", "ppo", "ppo_one_pass", "sample16", "sample1")
    benchmark(Peer("tunix", "Tunix", __file__, works, tunix_worker, ROPE_THETA), __doc__)
