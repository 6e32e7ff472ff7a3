"""TRL's trainers as the benchmarks against it run them."""

from pathlib import Path
from typing import Any


def shared_options(out: Path, batch_size: int) -> dict[str, Any]:
    """What all of TRL's trainers take: AdamW at a constant rate, float32, nothing saved or logged."""
    return {
        "output_dir": str(out), "per_device_train_batch_size": batch_size, "learning_rate": 1e-5,
        "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
        "adam_epsilon": 1e-8, "max_grad_norm": 1.0, "use_cpu": True, "bf16": False, "fp16": False,
        "gradient_checkpointing": False, "logging_strategy": "no", "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip


def make_trainer(
    work: str, folder: Path, rows: list[dict[str, str]], callback: Any, *, batch_size: int, **options: Any
) -> tuple[Any, list[float]]:
    """The trainer of sft, reward, dpo or dpo_precomputed, over rows in their order, and a list that gets its losses.

    Args:
      folder: has the Hugging Face folders `model` and `reward`.
      options: further arguments of the trainer's configuration.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    stage = work.removesuffix("_precomputed")
    options |= shared_options(folder / f"trl-{work}", batch_size) | {"train_sampling_strategy": "sequential"}
    kind = AutoModelForSequenceClassification if stage == "reward" else AutoModelForCausalLM
    model = kind.from_pretrained(folder / ("reward" if stage == "reward" else "model"), dtype=torch.float32)
    if stage == "sft":
        from trl import SFTConfig as Arguments
        from trl import SFTTrainer as Trainer

        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    elif stage == "reward":
        from trl import RewardConfig as Arguments
        from trl import RewardTrainer as Trainer
    else:
        from trl import DPOConfig as Arguments
        from trl import DPOTrainer as Trainer

        options |= {"beta": 0.1, "precompute_ref_log_probs": work == "dpo_precomputed"}
    trainer = Trainer(
        model=model, args=Arguments(**options), train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "model"), callbacks=[callback],
    )  # fmt: skip
    losses: list[float] = []
    training_step = trainer.training_step

    # what a trainer logs is rounded
    def kept(*arguments: Any, **named: Any) -> Any:
        loss = training_step(*arguments, **named)
        losses.append(float(loss))
        return loss

    trainer.training_step = kept  # type: ignore[method-assign]
    return trainer, losses


def make_ppo_trainer(
    folder: Path, prompts: list[list[int]], callback: Any, *, batch_size: int, length: int, episodes: int
) -> Any:
    """The trainer of TRL 1.12.0, the last release that has one: one update of both models an iteration.

    Args:
      folder: has the Hugging Face folders `model` and `reward`, whose model the critic starts from.
      prompts: ids.
      length: tokens of each sample, which no end token cuts.
      episodes: samples in all.

    Raises:
      ImportError: of another release.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32) for _ in "12")
    reward, critic = (
        AutoModelForSequenceClassification.from_pretrained(folder / "reward", dtype=torch.float32) for _ in "12"
    )
    arguments = PPOConfig(
        **shared_options(folder / "trl-ppo", batch_size), total_episodes=episodes, num_ppo_epochs=1,
        num_mini_batches=1, response_length=length, temperature=1.0, kl_coef=0.1, num_sample_generations=0,
        local_rollout_forward_batch_size=batch_size,
    )  # fmt: skip
    return PPOTrainer(
        args=arguments, processing_class=AutoTokenizer.from_pretrained(folder / "model"), model=policy,
        ref_model=reference, reward_model=reward, value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": prompts}), callbacks=[callback],
    )  # fmt: skip
