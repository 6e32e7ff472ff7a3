"""`Stage.programs` is one description: what it lists is what a stage calls, the very objects, and as often as it says.

Memory plans compile these programs, benchmarks time them, and a table's estimate adds up their work, so a program that
a stage runs and does not list is memory and time that nobody sees.
"""

import dataclasses
import functools
import gc
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from mpo_jax.config.load import load_config
from mpo_jax.data import toy
from mpo_jax.data.corpus import base_tokenizer, load_corpus
from mpo_jax.data.text import TextCodec
from mpo_jax.models import loading
from mpo_jax.models.forward import Model
from mpo_jax.models.hf import families
from mpo_jax.models.packed import packed_in
from mpo_jax.pipeline import table
from mpo_jax.pipeline.basis import Basis
from mpo_jax.pipeline.stages import STAGES, count_rows, stage_shapes, text_rewards
from mpo_jax.pipeline.table import Cost, TableStage
from mpo_jax.runtime.timing import Matmul
from mpo_jax.stages import sampling
from mpo_jax.stages.context import Inputs
from mpo_jax.stages.stage import Program
from mpo_jax.training.checkpoints import Checkpoints
from mpo_jax.types import trainable
from tests.models.tiny import random_params
from tests.pipeline.test_pipeline import MICRO, mpo
from tests.reward_models import with_other_ids

pytestmark = pytest.mark.thorough

PLAIN = ("experiment=mpo",)
MUCH = (
    "experiment=mpo", "seed=1", "select.num_prompts=40", "sft.train.accumulation=2", "reward.train.accumulation=2",
    "dpo.train.steps=null", "dpo.train.epochs=2", "ppo.train.steps=null", "ppo.train.epochs=1", "ppo.epochs=2",
    "ppo.minibatches=2", "ppo.extras.critic_warmup=1", "ppo.extras.ema_decay=0.9", "ppo.extras.ptx_coef=0.1",
    "ppo.score=normalised", "evaluate.num_prompts=9", "evaluate.batch_size=8",
    *(f"{stage}.train.{key}" for stage in ("sft", "reward", "dpo", "ppo") for key in ("eval_every=2", "eval_rows=11")),
)  # fmt: skip
HUMAN = ("experiment=dpo_base,ppo", "seed=2", "select.pair_source=human", "ppo.one_pass=true", "ppo.train.eval_every=2",
         "dpo.train.steps=null", "ppo.train.steps=null")  # fmt: skip
ADAPTERS = ("experiment=mpo_sft_kl,ppo", "seed=3", "model.adapter.rank=2")
"""PPO with a reference of its own, and with one that is the actor without its adapter."""
INT8 = ("experiment=mpo", "seed=4", "model.adapter.rank=2", "model.frozen_dtype=int8", "ppo.one_pass=true")
TEXT = ("experiment=mpo", "seed=3", "ppo.train.eval_every=2", "reward.path=OTHER")
"""A reward model with a tokenizer of its own."""
CONFIGURATIONS = {
    "plain": PLAIN, "much": MUCH, "human": HUMAN, "adapters": ADAPTERS, "int8": INT8, "text": TEXT,
}  # fmt: skip

ONCE = {
    "init_state", "init", "with_value_head",  # parameters and moments are made and placed
    "_cast",  # and stored in their type
    "adapt", "whole",  # adapters are made, and folded in
    "start",  # the first, empty rows that are refilled
    "make_minibatch",  # rows are gathered
    "_adder",  # the state's hashes are taken
    "make_narrow", "_make_measure", "_make_fill", "make_order",  # columns are cut, or rows packed
    "_make_first",  # and scores
}  # fmt: skip
"""Who makes the small programs that are not listed: they have no forward pass, and hold nothing but what they make."""


def live_bytes() -> int:
    """Of the memory of all arrays on one device, counted once where several arrays share it, as a shard's view does."""
    arrays = [array for array in jax.live_arrays() if not array.is_deleted() and len(array.devices()) == 1]
    return sum({array.unsafe_buffer_pointer(): array.nbytes for array in arrays}.values())


def listed_bytes(program: Program) -> int:
    """Of a program's arguments, without a packed batch, and of what its stage holds beside them."""
    arguments = program.arguments({})
    return size_of((arguments, program.held)) - size_of(packed_in(arguments))


def size_of(tree: Any) -> int:
    """Bytes of a tree's arrays or shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class Counted:
    """A jitted function that notes its calls, those with arrays alone.

    Attributes:
      live: bytes of all arrays at each call, without its packed batch: that is planned at full width.
    """

    def __init__(self, function: Any, maker: str, calls: list["Counted"]):
        self.function, self.maker, self.calls = function, maker, calls
        self.live: list[int] = []

    def __call__(self, *args: Any, **options: Any) -> Any:
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, options))):
            self.calls.append(self)
            self.live.append(live_bytes() - size_of(packed_in(args)))
        return self.function(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.function, name)


@dataclasses.dataclass
class Ran:
    """A stage that ran: what it lists for these amounts of data, its calls, and the inputs that it read.

    Attributes:
      live: bytes of arrays at each call of a listed program, those aside that were there before the stage.
      model: bytes of a model that does not train.
    """

    stage: str
    programs: dict[str, Program]
    calls: list[Counted]
    reads: set[str]
    recipe: Any
    live: dict[str, list[int]]
    model: int

    def is_estimated(self, name: str) -> bool:
        """Whether how often it runs depends on where samples end: rows that have ended are refilled."""
        return self.stage in ("select", "evaluate") and name.endswith(("prefill", "decode"))

    @property
    def counts(self) -> dict[str, int]:
        """Calls by program's name; of those that are not listed, by their makers."""
        names = {id(program.function): name for name, program in self.programs.items()}
        return dict(Counter(names.get(id(one), one.maker) for one in self.calls))


@functools.cache
def overrides_of(name: str) -> tuple[str, ...]:
    """A configuration's, with a reward model for OTHER."""
    if not any("OTHER" in one for one in CONFIGURATIONS[name]):
        return CONFIGURATIONS[name]
    folder, tokenizer = Path(tempfile.mkdtemp()), toy.make_tokenizer()
    decoder = loading.scratch_sizes(load_config(MICRO).model.architecture, len(tokenizer))
    loading.save(folder / "reward", Model(decoder), trainable(random_params(decoder, head="value")), tokenizer)
    other = with_other_ids(folder / "reward", folder / "other")
    return tuple(one.replace("OTHER", str(other)) for one in CONFIGURATIONS[name])


def clear_caches() -> None:
    """Forgets all functions that are made once."""
    for name, module in list(sys.modules.items()):
        if name.startswith("mpo_jax"):
            for value in vars(module).values():
                if callable(getattr(value, "cache_clear", None)):
                    value.cache_clear()


@pytest.fixture(scope="module", params=CONFIGURATIONS)
def ran(request, tmp_path_factory) -> Iterator[list[Ran]]:
    """Every stage of a run through the command line, with jitted functions that note their calls."""
    workdir, overrides = tmp_path_factory.mktemp("programs"), overrides_of(request.param)
    config, calls, reads, found = load_config(MICRO, overrides), [], [], []
    real, check = jax.jit, Inputs._check

    def jit(function: Any = None, **options: Any) -> Any:
        frame = sys._getframe(1)
        if function is None or not frame.f_globals["__name__"].startswith("mpo_jax"):
            return real(function, **options) if function is not None else functools.partial(jit, **options)
        maker = frame.f_code.co_name
        if (name := getattr(function, "__name__", "")) == "start":
            maker = name
        return Counted(real(function, **options), maker, calls)

    def watched(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(settings: Any, parents: Any, context: Any) -> Any:
            for one in calls:
                one.live.clear()
            calls.clear()
            reads.clear()
            gc.collect()
            before = live_bytes()
            summary = run(settings, parents, context)
            called, read = list(calls), set(reads)
            codec = TextCodec(base_tokenizer(config), config.text)
            model = parents["sft"].model if name in ("select", "evaluate") else context.folder / "model"
            shapes = stage_shapes(
                name, config, families.read_config(model), context.mesh,
                amounts=count_rows(config, load_corpus(config), codec),
                parents={role: made.id for role, made in parents.items()},
                text_rewards=text_rewards(config, context.mesh),
            )  # fmt: skip
            programs = list(STAGES[name].programs(settings, shapes))
            assert len({program.name for program in programs}) == len(programs)
            own = {id(one.function): one for one in called}
            live = {
                program.name: [size - before for size in own[id(program.function.function)].live]
                for program in programs
                if id(program.function.function) in own
            }
            by_name, model_bytes = {program.name: program for program in programs}, size_of(shapes.frozen())
            found.append(Ran(name, by_name, called, read, context.recipe, live, model_bytes))
            return summary

        return wrapped

    def noted(self: Inputs, name: str) -> None:
        reads.append(name)
        check(self, name)

    def written(self: Checkpoints, *args: Any, **options: Any) -> None:
        save(self, *args, **options)
        # until a checkpoint is written, its copy of the state is an array on the CPU
        self._manager.wait_until_finished()

    save = Checkpoints.save
    clear_caches()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", written)
        patch.setattr(Inputs, "_check", noted)
        patch.setattr(jax, "jit", jit)
        # which id ends a response changes neither memory nor work, but makes another function
        patch.setattr(sampling, "ANY_EOS", toy.make_tokenizer().eos_token_id)
        for name, stage in STAGES.items():
            patch.setitem(STAGES, name, dataclasses.replace(stage, run=watched(name, stage.run)))
        assert mpo("run", MICRO, f"workdir={workdir}", *overrides) == 0
        yield found
    clear_caches()


def test_what_runs_is_listed(ran):
    """By identity, and nothing but the small programs beside it."""
    for one in ran:
        assert one.counts.keys() <= one.programs.keys() | ONCE, one.stage


def test_what_is_listed_runs(ran):
    for one in ran:
        assert one.programs.keys() <= one.counts.keys(), one.stage


def test_it_runs_as_often_as_is_said(ran):
    """Exactly, but for rows that are refilled."""
    for one in ran:
        for name, program in one.programs.items():
            count = one.counts[name]
            if one.is_estimated(name):
                assert count / 2 <= program.runs <= 2 * count, name
            else:
                assert count == program.runs, name


def test_a_training_stage_holds_what_is_listed(ran):
    """The state and what a stage keeps beside it: no second copy of the initial parameters, nor of any model."""
    for one in ran:
        for name, program in one.programs.items():
            if program.accumulation is not None:
                assert len(one.live[name]) == one.counts[name] > 0
                listed = listed_bytes(program)
                low, high = listed - 0.2 * one.model, listed + 0.2 * one.model
                assert all(low < live < high for live in one.live[name]), (name, listed, one.model, one.live[name])


def test_a_table_s_estimate_adds_up_these_calls(ran, request, monkeypatch):
    """At an operation a second, so that seconds are operations: as many as the calls that were counted need."""
    overrides = overrides_of(request.node.callspec.params["ran"])
    config = load_config(MICRO, overrides)
    rate = 1 / (table.SHARE_OF_PEAK * config.mesh.num_devices)
    monkeypatch.setattr(table, "time_matmul", lambda dtype: Matmul(1, rate, True))
    cost = Cost(Basis(config))
    for one in ran:
        planned = TableStage(0, one.stage, one.recipe, (one.stage, one.stage), [one.stage], None)
        expected = 0.0
        for name, program in one.programs.items():
            slower = table.DECODING_COST if name.endswith("decode") else 1.0
            runs = program.runs if one.is_estimated(name) else one.counts[name]
            expected += slower * runs * program.mean_work.flops
        assert cost.seconds(planned) - table.FIXED_SECONDS == pytest.approx(expected, rel=1e-9), one.stage


def test_stages_read_what_they_declare(ran, request):
    """No more ever, and no less where they are measured on held-out rows."""
    for one in ran:
        declared = STAGES[one.stage].inputs
        assert one.reads <= declared
        assert one.reads == declared or request.node.callspec.params["ran"] != "much", one.stage


def test_all_stages_ran(ran):
    assert {"sft", "reward", "dpo", "ppo", "evaluate"} <= {one.stage for one in ran} <= set(STAGES)
