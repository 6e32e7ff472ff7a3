"""A model named on the command line, opened with its tokenizer and with limits that fit it."""

import dataclasses
from functools import cached_property
from pathlib import Path

from jax.sharding import Mesh

from mpo_jax import runtime
from mpo_jax.config import Config, load_config
from mpo_jax.errors import UserError
from mpo_jax.hub import local_model
from mpo_jax.model import loading
from mpo_jax.sharding import make_mesh
from mpo_jax.text import TextCodec, load_tokenizer


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model on disk and the configuration under which a command uses it; weights are read later."""

    path: Path
    source: loading.Source
    config: Config
    codec: TextCodec

    @cached_property
    def mesh(self) -> Mesh:
        return make_mesh(self.config.mesh)

    def with_room_for(self, new_tokens: int) -> "OpenModel":
        """The same model with limits for a prompt and so many tokens to be drawn.

        Raises:
          UserError: if that leaves no room for a prompt.
        """
        positions = self.source.decoder.max_positions
        if new_tokens >= positions:
            raise UserError(f"{new_tokens} new tokens leave no room for a prompt: the model has {positions} positions")
        limits = {"max_prompt_tokens": positions - new_tokens, "max_response_tokens": new_tokens}
        text = self.config.text.model_copy(update=limits)
        config = self.config.model_copy(update={"text": text})
        return dataclasses.replace(self, config=config, codec=TextCodec(self.codec.tokenizer, text))


def find_model(path: str, *, critic: bool = False) -> Path:
    """The model's own folder or file: of a stage's folder its `model/` (or `critic/`), of a run's folder its policy.

    Raises:
      UserError: if there is no model.
    """
    folder = Path(path).expanduser()
    part = "critic" if critic else "model"
    if (folder / "env.json").is_file():
        steps = sorted(
            (step for step in folder.iterdir() if step.name[0].isdigit()), key=lambda s: int(s.name.split("-")[0])
        )
        folder = steps[-1] if steps else folder / "sft"
    if (folder / part / "config.json").is_file():
        return folder / part
    if critic:
        raise UserError(f"{path} holds no critic: only PPO's folders do")
    return local_model(str(folder) if folder.exists() else path)


def open_model(path: str, overrides: tuple[str, ...]) -> OpenModel:
    """A model from any path that `find_model` takes; prompt and response may have half its positions each, unless the
    overrides say otherwise.
    """
    config = load_config(None, overrides)
    runtime.start(config.runtime)
    found = find_model(path)
    source = loading.open_model(found)
    half = source.decoder.max_positions // 2
    given = {override.partition("=")[0].strip() for override in overrides}
    limits = {key: half for key in ("max_prompt_tokens", "max_response_tokens") if f"text.{key}" not in given}
    codec = TextCodec(load_tokenizer(found), config.text.model_copy(update=limits))
    loading.check_vocabulary(codec, source.decoder, found)
    return OpenModel(found, source, config.model_copy(update={"text": codec.config}), codec)
