"""A model named by a path, opened with its tokenizer and the text settings that it was trained under."""

import dataclasses
from functools import cache, cached_property
from pathlib import Path

from jax.sharding import Mesh

from mpo_jax.config.load import load_config
from mpo_jax.config.schema import TRAINED, Config, TextConfig
from mpo_jax.data import hh
from mpo_jax.data.chat import Chat, Message, read_template
from mpo_jax.data.rendering import Renderer, user_turn
from mpo_jax.data.reward_codec import RewardCodec
from mpo_jax.data.text import TextCodec
from mpo_jax.errors import GOES_ON, Damaged, UserError
from mpo_jax.models import loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf.hub import local_model
from mpo_jax.models.hf.tokenizer import load_tokenizer
from mpo_jax.pipeline.experiments import is_run
from mpo_jax.pipeline.recipe import MANIFEST, RECIPE, is_stage_folder, read_recipe
from mpo_jax.pipeline.run_folder import is_run_folder, is_up_to_reward, last_step
from mpo_jax.runtime import machine
from mpo_jax.runtime.files import anew
from mpo_jax.runtime.sharding import make_mesh
from mpo_jax.tools.report.card import trained_config
from mpo_jax.types import REMOVED, Head, Params

NEW_TOKENS = 256
UNFINISHED = (
    "the stage is not finished, and its model is not written yet. Run the command that makes it again, which goes on "
    "from what is saved; or write the model of its newest checkpoint with mpo export, and name that"
)


@dataclasses.dataclass(frozen=True)
class OpenModel:
    """A model on disk and the configuration under which it is used; weights are read later.

    Attributes:
      config: the user's. Its section `text` is the one that the model was trained under, where that is known; the
        user's keys win.
      trained: the configuration that it was trained under, where that is known.
      given: the keys of `text` that the user gave.
    """

    path: Path
    source: loading.Source
    config: Config
    codec: TextCodec
    trained: Config | None
    given: frozenset[str]

    @cached_property
    def mesh(self) -> Mesh:
        return make_mesh(self.config.mesh)

    def load(self, head: Head = "lm") -> tuple[Model, Params]:
        """The model with its weights, which do not train."""
        options = loading.Options.of(self.config.model)
        return loading.load(
            self.path, options, self.mesh, text=self.config.text, head=head, frozen=True,
            num_ids=self.codec.vocab_size, label=self.config.reward.label,
        )  # fmt: skip

    def knows(self, key: str) -> bool:
        """Whether training or the user has set `text.KEY`."""
        return self.trained is not None or key in self.given

    @property
    def chat(self) -> bool:
        """Whether prompts are turns of a chat: as in training; of a model from elsewhere, if it has a chat template."""
        return self.config.text.chat if self.knows("chat") else bool(self.codec.tokenizer.chat_template)

    @property
    def reads_text(self) -> bool:
        """Whether it is a reward model that reads each row as one text: one from elsewhere (`Source.scored_at_end`)."""
        return self.source.head == "value" and not self.source.scored_at_end

    @property
    def reward_codec(self) -> RewardCodec:
        """How texts become rows of a reward model that `reads_text`, as in a run with it as reward.path."""
        return RewardCodec.of(self.codec.tokenizer, self.source.decoder.max_positions, self.codec, str(self.path))

    def text_renderer(self, conversations: dict[str, tuple[Message, ...]]) -> Renderer:
        """`renderer` for a reward model that `reads_text`: each row gets a score, so no system turn is refused.

        Args:
          conversations: gets the turns of every prompt that is rendered, by its text.
        """
        return dataclasses.replace(self.with_text(fold_system=True).renderer, conversations=conversations)

    @property
    def renderer(self) -> Renderer:
        """How rows become prompts, as in training; plain prompts of a model from elsewhere stay as they are."""
        dialogues = self.trained is not None and self.trained.data.kind == "hh"
        chat = cache(lambda: Chat.of(self.codec.tokenizer, self.config.text))
        return Renderer(chat, wrap=self.config.text.chat, turns=hh.dialogue_turns if dialogues else user_turn)

    @property
    def new_tokens(self) -> int:
        """Tokens of a response where neither training nor the user sets their number: half the positions if few."""
        return min(NEW_TOKENS, self.source.decoder.max_positions // 2)

    def with_text(self, **settings: str | int | bool) -> "OpenModel":
        """The same model under other settings of the section `text`."""
        text = self.config.text.model_copy(update=settings)
        config = self.config.model_copy(update={"text": text})
        return dataclasses.replace(self, config=config, codec=TextCodec(self.codec.tokenizer, text))

    def for_rendered_prompts(self) -> "OpenModel":
        """The same model for prompts that are complete: neither chat nor template is added."""
        return self.with_text(chat=False, prompt_template="{prompt}")

    def with_room_for(self, new_tokens: int, *, whole_prompts: bool = False) -> "OpenModel":
        """The same model with room for a prompt and `new_tokens` tokens of a response.

        Args:
          whole_prompts: give the prompt all other positions, however long prompts were in training.

        Raises:
          UserError: if no room is left for a prompt.
        """
        positions = self.source.decoder.max_positions
        if new_tokens >= positions:
            raise UserError(f"{new_tokens} new tokens leave no room for a prompt: the model has {positions} positions")
        room = positions - new_tokens
        if self.knows("max_prompt_tokens") and not whole_prompts:
            room = min(room, self.config.text.max_prompt_tokens)
        return self.with_text(max_prompt_tokens=room, max_response_tokens=new_tokens)


def find_model(path: str, *, critic: bool = False) -> Path:
    """The model's own folder or file: of a stage's folder its `model/` (or `critic/`), of a run's folder its policy,
    of a workdir with one run that run's.

    Raises:
      UserError: if there is no model, a workdir has several runs, or a run ends with its reward model.
    """
    folder = _only_run(Path(path).expanduser())
    part = "critic" if critic else "model"
    if is_run_folder(folder):
        if not critic and is_up_to_reward(folder):
            raise UserError(
                f"{path} was made up to its reward model: name {folder / 'reward'} for that, or {folder / 'sft'} for "
                "the language model"
            )
        folder = last_step(folder)
    if (folder / part / "config.json").is_file():
        return folder / part
    _refuse_missing(path, folder, part)
    if critic:
        raise UserError(f"{path} holds no critic: only PPO's folders do")
    if finished := sorted(stage for stage in (folder / "stages").glob("*") if (stage / part).is_dir()):
        raise UserError(
            f"{path} holds no finished run: {GOES_ON} what is saved; or name one of its finished stages: "
            f"{', '.join(map(str, finished))}"
        )
    return local_model(str(folder) if folder.exists() else path)


def _only_run(folder: Path) -> Path:
    """The only run's folder of a workdir, or any of them if all have one policy; any other folder itself."""
    runs = sorted(run for run in (folder / "runs").glob("*") if is_run(run.name) and is_run_folder(run))
    if len({last_step(run).resolve() for run in runs}) > 1:
        raise UserError(f"{folder} holds several runs: name one of {', '.join(map(str, runs))}")
    return runs[0] if runs else folder


def _refuse_missing(path: str, folder: Path, part: str) -> None:
    """Raises UserError if a stage's folder holds no model because the configuration says so."""
    if not any((folder / name).is_file() for name in (MANIFEST, RECIPE)):
        if is_stage_folder(folder):
            raise Damaged(folder / MANIFEST, "is missing", anew(folder))
        return
    recipe = read_recipe(folder)
    if part in recipe.get(REMOVED, ()):
        raise UserError(
            f"{path}: its {part} was removed when no stage needed it any more (runtime.keep=last): "
            f"mpo {recipe['stage']} CONFIG makes it again"
        )
    if part == "model" and (function := recipe.get("settings", {}).get("function")) is not None:
        raise UserError(f"{path} holds no model: its rewards come from the Python function {function}")
    if part == "critic" and recipe.get("settings", {}).get("save_critic") is False:
        raise UserError(
            f"{path} holds no critic: it was trained with ppo.save_critic=false; train with ppo.save_critic=true to "
            "have one"
        )
    if (folder / RECIPE).is_file():
        raise UserError(f"{path}: {UNFINISHED}")
    if part == "model" and recipe["stage"] in TRAINED:
        raise Damaged(folder / part / "config.json", "is missing", anew(folder))


def open_model(path: str, overrides: tuple[str, ...]) -> OpenModel:
    """A model from any path that `find_model` takes, under the template, chat setting, BOS and lengths of its training.

    A run's or stage's folder and an exported one know these. Of a model from elsewhere prompt and response may have
    half of its positions each. The overrides win over both.
    """
    config = load_config(None, overrides)
    machine.start(config.runtime)
    found = find_model(path)
    if (found.parent / RECIPE).is_file() and not any(found.glob("*.safetensors")):
        raise UserError(f"{path}: {UNFINISHED}")
    source = loading.open_model(found, label=config.reward.label)
    trained, half = trained_config(found), source.decoder.max_positions // 2
    own = TextConfig(max_prompt_tokens=half, max_response_tokens=half) if trained is None else trained.text
    given = config.text.model_fields_set
    tokenizer = load_tokenizer(found)
    if config.text.chat_template is not None:
        # a trained model's tokenizer carries the template of its training
        tokenizer.chat_template = read_template(config.text.chat_template)
    codec = TextCodec(tokenizer, own.model_copy(update={key: getattr(config.text, key) for key in given}))
    source = source.fitting(codec.vocab_size)
    config = config.model_copy(update={"text": codec.config})
    return OpenModel(found, source, config, codec, trained, frozenset(given))
