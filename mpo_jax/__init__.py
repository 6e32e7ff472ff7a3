"""Mixed Preference Optimization in JAX. Names are imported on first use, so that `import mpo_jax` costs nothing."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpo_jax.runtime.version import __version__ as __version__
    from mpo_jax.tools.api.functions import sample, score, select
    from mpo_jax.tools.api.models import LoadedModel, load, load_reward, make_mesh, save
    from mpo_jax.tools.api.ppo import Ppo
    from mpo_jax.tools.api.rows import Pairs, Rows, read_demonstrations, read_pairs, read_prompts
    from mpo_jax.tools.api.trainers import Dpo, Reward, Sft, Trainer, train
    from mpo_jax.training.loop import Checkpointing, Fitted, Hooks, fit
    from mpo_jax.training.update import init_state, make_update

# transformers reports on import that PyTorch is missing, which this package does without
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_API = "mpo_jax.tools.api"
_HOMES = {
    **dict.fromkeys(("load", "load_reward", "make_mesh", "save", "LoadedModel"), f"{_API}.models"),
    **dict.fromkeys(("read_pairs", "read_demonstrations", "read_prompts", "Pairs", "Rows"), f"{_API}.rows"),
    **dict.fromkeys(("Sft", "Reward", "Dpo", "Trainer", "train"), f"{_API}.trainers"),
    "Ppo": f"{_API}.ppo",
    **dict.fromkeys(("select", "sample", "score"), f"{_API}.functions"),
    **dict.fromkeys(("fit", "Fitted", "Hooks", "Checkpointing"), "mpo_jax.training.loop"),
    **dict.fromkeys(("make_update", "init_state"), "mpo_jax.training.update"),
    "__version__": "mpo_jax.runtime.version",
}

__all__ = [
    "Checkpointing", "Dpo", "Fitted", "Hooks", "LoadedModel", "Pairs", "Ppo", "Reward", "Rows", "Sft", "Trainer",
    "fit", "init_state", "load", "load_reward", "make_mesh", "make_update", "read_demonstrations", "read_pairs",
    "read_prompts", "sample", "save", "score", "select", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
