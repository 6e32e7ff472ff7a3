"""The sections `mesh` and `runtime`: devices, processes, caches, logging."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from mpo_jax.config.base import Section


class MeshConfig(Section, frozen=True):
    """Devices along each axis of the mesh; their product is the number of devices used."""

    data: int = Field(default=1, gt=0)
    fsdp: int = Field(default=1, gt=0)
    tensor: int = Field(default=1, gt=0)

    @property
    def num_devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def batch_shards(self) -> int:
        return self.data * self.fsdp


class ProcessesConfig(Section, frozen=True):
    """Several processes, one a host. Found by itself under SLURM, Open MPI, Kubernetes jobs and TPU pods."""

    coordinator: str | None = Field(default=None, description="host:port of process 0")
    count: int | None = Field(default=None, gt=0)
    index: int | None = Field(default=None, ge=0)
    timeout_s: int = Field(default=100, gt=0, description="seconds without a sign of life after which the others stop")


class WandbConfig(Section, frozen=True):
    """Weights & Biases (the extra `wandb`). Its key is WANDB_API_KEY or that of `wandb login`: it has no place here."""

    project: str = Field(default="mpo_jax", pattern=r"^[^/\\#?%:]{1,128}$")
    entity: str | None = Field(default=None, min_length=1, description="user or team; null: the account's own default")
    mode: Literal["online", "offline", "disabled"] | None = Field(
        default=None,
        description="offline: runs stay in workdir/wandb, for `wandb sync`; null: what WANDB_MODE says, else online",
    )


class RuntimeConfig(Section, frozen=True):
    """The machine, not the method: nothing here changes results beyond rounding or enters an artifact's hash."""

    cpu_devices: int | None = Field(default=None, gt=0, description="simulated CPU devices; null: what the machine has")
    compilation_cache: str | None = Field(default="~/.cache/mpo_jax/xla", description="folder; null: none")
    flags: Literal["none", "recommended"] = Field(
        default="none",
        description="compiler flags: none beyond XLA_FLAGS and LIBTPU_INIT_ARGS, or those of flags.py too",
    )
    processes: ProcessesConfig = Field(default_factory=lambda: ProcessesConfig())
    token_cache: str | None = Field(default="~/.cache/mpo_jax/tokens", description="folder; null: none")
    tensorboard: bool = True
    wandb: WandbConfig | None = Field(default=None, description="{project, entity, mode}; null: no Weights & Biases")
    offload_frozen: bool = Field(
        default=False, description="PPO's reference and reward model lie in host memory but while they score"
    )
    offload_moments: bool = Field(
        default=False, description="PPO's optimiser moments lie in host memory but for their own model's update"
    )
    keep_checkpoints: bool = Field(
        default=False, description="a finished stage keeps its last checkpoints, for mpo verify; false: its model alone"
    )
    bucket: str | None = Field(
        default=None,
        pattern=r"^(gs|s3|file)://.+",
        description="gs://, s3:// or file:// folder that keeps what workdir holds, for other hosts and after this one",
    )

    @model_validator(mode="after")
    def _one_place_for_checkpoints(self) -> "RuntimeConfig":
        if self.keep_checkpoints and self.bucket is not None:
            raise ValueError("keep_checkpoints=true keeps them in workdir, and bucket takes them from there: set one")
        return self

    @property
    def token_cache_folder(self) -> Path | None:
        return None if self.token_cache is None else Path(self.token_cache).expanduser()
