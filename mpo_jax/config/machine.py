"""The sections `mesh` and `runtime`: devices, processes, caches, logging."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from mpo_jax.config.base import Section


class MeshConfig(Section, frozen=True):
    """Devices along each axis of the mesh, their product in all. Batches must divide by data x fsdp."""

    data: int = Field(
        default=1, gt=0, description="data parallelism: copies of the model, each with its part of a batch"
    )
    fsdp: int = Field(
        default=1, gt=0, description="parts into which parameters, optimiser state and the batch are sharded"
    )
    tensor: int = Field(default=1, gt=0, description="tensor parallelism: parts into which each matrix is split")

    @property
    def num_devices(self) -> int:
        return self.data * self.fsdp * self.tensor

    @property
    def batch_shards(self) -> int:
        return self.data * self.fsdp


class ProcessesConfig(Section, frozen=True):
    """Several processes, one per host. Under SLURM, Open MPI, Kubernetes jobs and TPU pods they are detected."""

    coordinator: str | None = Field(
        default=None, description="host:port of process 0; needs count and index too; null: detected, or one process"
    )
    count: int | None = Field(default=None, gt=0, description="number of processes; with coordinator")
    index: int | None = Field(
        default=None, ge=0, description="number of this process, from 0, different in each; with coordinator"
    )
    timeout_s: int = Field(
        default=100,
        gt=0,
        description="seconds to wait for the other processes, at the start and for their heartbeats, before giving up",
    )


class WandbConfig(Section, frozen=True):
    """Logging to Weights & Biases (extra `wandb`). The API key comes from WANDB_API_KEY or `wandb login` alone."""

    project: str = Field(
        default="mpo_jax",
        pattern=r"^[^/\\#?%:]{1,128}$",
        description="project, 1 to 128 characters without / \\ # ? % :",
    )
    entity: str | None = Field(default=None, min_length=1, description="user or team; null: the account's default")
    mode: Literal["online", "offline", "disabled"] | None = Field(
        default=None,
        description="offline: runs are kept in workdir/wandb, for wandb sync; null: WANDB_MODE, else online",
    )


class RuntimeConfig(Section, frozen=True):
    """The machine, not the method. These keys change results by rounding at most; only `save_dtype` redoes stages."""

    cpu_devices: int | None = Field(
        default=None, gt=0, description="run on this many simulated CPU devices; null: the machine's devices"
    )
    compilation_cache: str | None = Field(
        default="~/.cache/mpo_jax/xla",
        description="folder for compiled programs, reused by later runs, or an "
        "address that JAX can write to, such as gs://BUCKET/FOLDER; null: no cache",
    )
    compile_threads: int | None = Field(
        default=None,
        gt=0,
        description="programs of a training stage that are compiled at the same time before its first step; 1: each "
        "when it is first called; null: 4 for models of 300M parameters or more, otherwise 1",
    )
    flags: Literal["none", "recommended"] = Field(
        default="none",
        description="XLA compiler flags; recommended: those of mpo_jax/runtime/flags.py; none: only what XLA_FLAGS and "
        "LIBTPU_INIT_ARGS set",
    )
    processes: ProcessesConfig = Field(default_factory=lambda: ProcessesConfig())
    token_cache: str | None = Field(
        default="~/.cache/mpo_jax/tokens", description="folder for tokenized rows, reused by later runs; null: no cache"
    )
    fingerprint_cache: str | None = Field(
        default="~/.cache/mpo_jax/fingerprints",
        description="folder for the sha256 of model and data files, so that later runs read no unchanged file to name "
        "their stages; null: no cache",
    )
    tensorboard: bool = Field(default=True, description="write TensorBoard event files for every stage")
    wandb: WandbConfig | None = Field(
        default=None, description="log to Weights & Biases with these settings, {} for the defaults; null: do not"
    )
    offload_frozen: bool = Field(
        default=False,
        description="keep PPO's reference and reward model in host memory and copy them to the devices only for "
        "scoring; with adapters, what critic and reward model share leaves the devices while tokens are drawn",
    )
    offload_moments: bool = Field(
        default=False,
        description="keep PPO's optimiser moments in host memory and copy them to the devices only for their update",
    )
    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="type in which stages save their models, which later stages start from; training state in "
        "checkpoints stays float32. auto: bfloat16 on accelerators, float32 on CPU",
    )
    keep: Literal["all", "last"] = Field(
        default="all",
        description="models kept in workdir by mpo run and mpo table; last: a model is removed once no stage of the "
        "requested runs needs it, except the runs' final policies and the reward model. A removed model is fetched "
        "from the bucket or made again if a later run needs it; one command at a time in a workdir",
    )
    keep_finished_checkpoints: bool = Field(
        default=False,
        description="keep a finished stage's last checkpoints, which mpo verify needs; false: keep only its model",
    )
    save_minutes: float = Field(
        default=5.0,
        ge=0.0,
        allow_inf_nan=False,
        description="minutes between two savings of finished rows in passes outside training: sampling, scoring and "
        "reference log-probabilities; 0: after every batch",
    )
    bucket: str | None = Field(
        default=None,
        pattern=r"^(gs|s3|file)://.+",
        description="gs://, s3:// or file:// folder that keeps finished stages, checkpoints and reports too, so that a "
        "run can go on from another host; null: workdir only",
    )

    @model_validator(mode="after")
    def _one_place_for_checkpoints(self) -> "RuntimeConfig":
        if self.keep_finished_checkpoints and self.bucket is not None:
            raise ValueError(
                "keep_finished_checkpoints=true keeps them in workdir, and bucket takes them from there: set one"
            )
        return self

    @property
    def token_cache_folder(self) -> Path | None:
        return None if self.token_cache is None else Path(self.token_cache).expanduser()

    @property
    def fingerprint_cache_folder(self) -> Path | None:
        return None if self.fingerprint_cache is None else Path(self.fingerprint_cache).expanduser()
