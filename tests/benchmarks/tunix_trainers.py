"""Tunix's models and trainers as the benchmarks against it run them."""

from pathlib import Path
from typing import Any

from peers import HEAD_DIM, HEADS, HIDDEN, LAYERS, MLP, VOCAB

ROPE_THETA = 1e6
"""What Tunix's Llama turns by, whatever its configuration says."""


def load_model(folder: Path) -> Any:
    """The model of folder/model, in float32."""
    import jax.numpy as jnp
    from tunix.models.llama3 import model, params

    config = model.ModelConfig(
        num_layers=LAYERS, vocab_size=VOCAB, embed_dim=HIDDEN, hidden_dim=MLP, num_heads=HEADS, head_dim=HEAD_DIM,
        num_kv_heads=HEADS, rope_theta=int(ROPE_THETA), norm_eps=1e-5, weight_tying=False,
    )  # fmt: skip
    return params.create_model_from_safe_tensors(str(folder / "model"), config, dtype=jnp.float32)


def load_judge(folder: Path) -> Any:
    """The reward model, as critic too: the body of folder/model under the score of folder/reward."""
    import jax.numpy as jnp
    from flax import nnx
    from safetensors.numpy import load_file
    from tunix.rl.utils import create_critic_model

    class Judge(nnx.Module):
        def __init__(self, model: Any):
            self.model = model

        # a critic is called with segment ids, which Tunix's Llama does not take
        def __call__(
            self, tokens: Any, positions: Any, cache: Any, attention_mask: Any, segment_ids: Any = None
        ) -> Any:
            return self.model(tokens, positions, cache, attention_mask)

    model = create_critic_model(load_model(folder))
    score = load_file(folder / "reward" / "model.safetensors")["score.weight"]
    model.lm_head.kernel.value = jnp.asarray(score.T)
    return Judge(model)


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "model")


def make_optimizer() -> Any:
    import optax

    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5, weight_decay=0.0))


def make_cluster(folder: Path, mesh: Any, models: dict[str, Any], *, prompt: int, response: int) -> Any:
    """The four models with their optimizers and a sampler.

    Args:
      models: actor, reference, critic and reward.
      prompt: tokens that a prompt is padded to, at least as many as any has.
      response: tokens of each sample, which no end token cuts.
    """
    from tunix.rl import rl_cluster
    from tunix.rl.rollout.base_rollout import RolloutConfig

    return rl_cluster.RLCluster(
        **models,
        tokenizer=load_tokenizer(folder),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh={role: mesh for role in rl_cluster.Role},
            training_config=rl_cluster.RLTrainingConfig(
                actor_optimizer=make_optimizer(), critic_optimizer=make_optimizer(), eval_every_n_steps=10**6,
                max_steps=10**6,
            ),
            # an id that no token has ends a response: never
            rollout_config=RolloutConfig(
                max_tokens_to_generate=response, max_prompt_length=prompt, kv_cache_size=prompt + response,
                temperature=1.0, top_p=1.0, eos_tokens=[VOCAB],
            ),
        ),
    )  # fmt: skip


def make_learner(cluster: Any) -> Any:
    """PPO with one update of both models an iteration, and the KL estimated by log-ratios, as mpo_jax has it."""
    from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner

    return PPOLearner(cluster, PPOConfig(num_iterations=1, beta=0.1, kl_method="kl"))


def wait_for(cluster: Any) -> None:
    """Blocks until both models that train are up to date."""
    import jax
    from flax import nnx

    jax.block_until_ready([nnx.state(cluster.actor_trainer.model), nnx.state(cluster.critic_trainer.model)])
