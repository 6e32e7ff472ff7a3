"""mpo_jax.models.hf.families: config.json of each architecture to sizes and back, and what is refused."""

import dataclasses
import json
import math
from dataclasses import replace
from typing import Any

import pytest
from transformers import AutoConfig

from mpo_jax.errors import UserError
from mpo_jax.models import forward
from mpo_jax.models.hf import families
from mpo_jax.models.spec import LayerSpec, RopeScaling
from tests.models.tiny import DECODER, LANGUAGE_MODELS, RECORDED, REWARD_MODELS, of_family, with_layers

NAMES = LANGUAGE_MODELS + REWARD_MODELS
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
YARN = RopeScaling("yarn", 4.0, 1.0, 8.0, 32, 0.1 * math.log(4) + 1)
NEOX = replace(families.FAMILIES["gpt_neox"].layer, rope_theta=500.0, rope_fraction=0.5)
LOCAL, FULL = "sliding_attention", "full_attention"
COMMON = (
    "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings",
    "hidden_act", "initializer_range",
)  # fmt: skip
GEMMA = (
    "head_dim", "attention_bias", "sliding_window", "layer_types", "query_pre_attn_scalar", "attn_logit_softcapping",
    "final_logit_softcapping", "use_bidirectional_attention",
)  # fmt: skip
OPTIONS = {
    "llama": ("head_dim", "attention_bias", "mlp_bias"),
    "mistral": ("head_dim", "sliding_window"),
    "qwen2": ("use_sliding_window", "sliding_window", "layer_types"),
    "qwen3": ("head_dim", "attention_bias", "use_sliding_window", "sliding_window", "layer_types"),
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "olmo2": ("attention_bias",),
    "gpt_neox": ("attention_bias", "use_parallel_residual"),
}
"""Options of transformers' configuration that change what a model computes."""


STRETCHED = [RopeScaling("dynamic", 2.0), RopeScaling("yarn", 4.0, 2.0, 16.0, 512, 1.25, False)]


def export(folder, config, *, head="lm", **options: Any):
    given: dict[str, Any] = {"eos_id": 2, "bos_id": 1} | options
    families.save_config(folder, config, head=head, **given)
    return folder


def changed(tmp_path, name, **changes):
    """A folder whose config.json is the recorded one of `name` with other values."""
    raw = json.loads((RECORDED / name / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return tmp_path


def plain_layer(family):
    return families.FAMILIES[family].layer


def test_sizes_of_llama():
    untied, tied = (families.read_config(RECORDED / name) for name in ("untied", "tied"))
    assert (untied.num_heads, untied.num_kv_heads, untied.head_dim, untied.norm_eps) == (4, 2, 8, 1e-3)
    assert (tied.num_kv_heads, tied.head_dim, tied.tie_embeddings) == (1, 12, True)
    assert (untied.vocab_size, untied.hidden_size, untied.intermediate_size, untied.max_positions) == (40, 32, 36, 64)
    assert (untied.num_layers, tied.num_layers, untied.tie_embeddings) == (2, 3, False)
    assert (tied.init_std, tied.family) == (0.25, "llama")
    assert (untied.pattern, tied.pattern) == ((LayerSpec(),), (LayerSpec(rope_theta=500.0),))


@pytest.mark.parametrize(
    ("name", "family", "layer"),
    [
        ("llama3", "llama", LayerSpec(rope_theta=500.0, rope_scaling=LLAMA3)),
        ("linear", "llama", LayerSpec(rope_scaling=RopeScaling("linear", 4.0))),
        ("mistral", "mistral", LayerSpec(window=5)),
        ("qwen2", "qwen2", LayerSpec(qkv_bias=True)),
        ("qwen3", "qwen3", LayerSpec(qk_norm=True)),
        ("qwen2_score", "qwen2", LayerSpec(qkv_bias=True, window=4)),
        ("yarn", "qwen3", LayerSpec(qk_norm=True, rope_theta=500.0, rope_scaling=YARN)),
        ("olmo2", "olmo2", LayerSpec(qk_norm=True, qk_norm_joint=True, norm_places="after")),
        ("gpt_neox", "gpt_neox", NEOX),
        ("gpt_neox_score", "gpt_neox", replace(NEOX, qkv_bias=False, output_bias=False, parallel=False)),
    ],
)
def test_options_of_each_family(name, family, layer):
    config = families.read_config(RECORDED / name)
    assert (config.family, config.pattern) == (family, (layer,))


def test_options_of_gemma():
    """Layers of two kinds that share all but the window, in Gemma 3 also the rotary frequencies."""
    two, three, plain = (families.read_config(RECORDED / name) for name in ("gemma2", "gemma3", "gemma2_score"))
    both = LayerSpec(norm_places="around", scale=20**-0.5, activation="gelu_tanh")
    capped = replace(both, soft_cap=2.0)
    assert two.layers == (replace(capped, window=4), capped, replace(capped, window=4))
    assert (len(two.pattern), two.final_soft_cap, plain.final_soft_cap) == (2, 4.0, 30.0)
    normed = replace(both, qk_norm=True)
    local = replace(normed, window=4, rope_theta=100.0)
    full = replace(normed, rope_theta=500.0, rope_scaling=RopeScaling("linear", 4.0))
    assert (three.layers, len(three.pattern), three.final_soft_cap) == ((local, local, full, local), 3, None)
    for config in (two, three, plain):
        assert (config.norm, config.scale_embedding, config.tie_embeddings) == ("rms_offset", True, True)


@pytest.mark.parametrize(
    ("family", "sizes", "parameters"),
    [
        # gemma-2-2b, gemma-3-1b, OLMo-2-1124-7B, pythia-160m
        ("gemma2", (256000, 2304, 9216, 26, 8, 4, 256), 2_614_341_888),
        ("gemma3_text", (262144, 1152, 6912, 26, 4, 1, 256), 999_885_952),
        ("olmo2", (100352, 4096, 11008, 32, 32, 32, 128), 7_298_617_344),
        ("gpt_neox", (50304, 768, 3072, 12, 12, 12, 64), 162_322_944),
    ],
)
def test_published_numbers_of_parameters(family, sizes, parameters):
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim",
    )  # fmt: skip
    config = of_family(family, **dict(zip(names, sizes, strict=True)), tie_embeddings=family.startswith("gemma"))
    assert forward.num_parameters(config) == parameters


def test_default_layers_of_gemma(tmp_path):
    """Configurations on the hub say no layer_types: a window in every other layer, or in five of six."""
    two = families.read_config(changed(tmp_path, "gemma2", layer_types=None))
    assert [spec.window for spec in two.layers] == [4, None, 4]
    older = {"rope_parameters": None, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "num_hidden_layers": 26}
    three = families.read_config(changed(tmp_path, "gemma3", layer_types=None, sliding_window_pattern=6, **older))
    assert [spec.window is None for spec in three.layers] == [i % 6 == 5 for i in range(26)]
    assert [spec.rope_theta for spec in three.pattern] == [1e4] * 5 + [1e6]


def test_older_keys_of_pythia(tmp_path):
    """Before version 5 the rotary base and fraction had names of their own."""
    folder = changed(tmp_path, "gpt_neox", rope_parameters=None, rotary_pct=0.25, rotary_emb_base=10000)
    assert families.read_config(folder).pattern == (replace(NEOX, rope_fraction=0.25, rope_theta=1e4),)


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 0.7}, 0.7),
        ({"mscale": 0.5, "mscale_all_dim": 0.2}, (0.05 * math.log(4) + 1) / (0.02 * math.log(4) + 1)),
        ({"mscale": 0.5}, 0.1 * math.log(4) + 1),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_attention_factor_of_yarn(changes, factor, tmp_path):
    raw = json.loads((RECORDED / "yarn" / "config.json").read_text())["rope_parameters"]
    found = families.read_config(changed(tmp_path, "yarn", rope_parameters=raw | changes)).pattern[0].rope_scaling
    assert found == replace(YARN, factor=changes.get("factor", 4.0), attention_factor=pytest.approx(factor))


@pytest.mark.parametrize("name", NAMES)
def test_exported_config_reads_the_same_here_and_in_transformers(name, tmp_path):
    config, head = families.read_config(RECORDED / name), "value" if name in REWARD_MODELS else "lm"
    export(tmp_path, config, head=head, eos_id=7, bos_id=None, pad_id=3, dtype="bfloat16")
    assert families.read_config(tmp_path) == config
    assert families.read_head(tmp_path) == families.read_head(RECORDED / name) == head
    read, original = AutoConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(RECORDED / name)
    assert type(read) is type(original)
    family = families.FAMILIES[config.family]
    for field in COMMON + OPTIONS[config.family]:
        name = family.key(field)
        if name == "rope_parameters":
            # what was left to its default is written out
            assert original.rope_parameters.items() <= read.rope_parameters.items()
        elif not (family.plain_heads and name == "num_key_value_heads"):
            assert getattr(read, name) == getattr(original, name), name
    assert family.plain_heads or read.head_dim == config.head_dim
    assert (read.eos_token_id, read.bos_token_id, read.pad_token_id) == (7, None, 3)
    assert str(read.dtype).removeprefix("torch.") == "bfloat16"
    assert head == "lm" or read.num_labels == 1


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
@pytest.mark.parametrize(("window", "activation"), [(None, "gelu_tanh"), (7, "silu")])
@pytest.mark.parametrize(
    "scaling", [None, RopeScaling("linear", 2.5), RopeScaling("llama3", 4.0, 2.0, 5.0, 512), *STRETCHED]
)
def test_every_option_survives_the_round_trip(family, window, activation, scaling, tmp_path):
    plain = of_family(family)
    config = with_layers(
        plain,
        dataclasses.replace(plain.pattern[0], rope_scaling=scaling, rope_theta=1e6, activation=activation),
        norm_eps=3e-6,
        tie_embeddings=True,
        init_std=0.01,
    )
    if families.FAMILIES[family].sliding_window:
        config = with_layers(config, dataclasses.replace(config.pattern[0], window=window))
    assert families.read_config(export(tmp_path, config)) == config


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    ("kinds", "period", "first"),
    [
        ([LOCAL, FULL] * 2, 2, 0),
        ([FULL, LOCAL] * 2, 2, 1),
        ([LOCAL] * 3 + [FULL], 4, 0),
        ([LOCAL, LOCAL, FULL] * 2, 3, 0),
        ([FULL, FULL, FULL, LOCAL, LOCAL], 5, 3),
        ([LOCAL] * 4, 1, 0),
        ([FULL] * 4, 1, 0),
    ],
)
def test_layers_of_two_kinds(name, kinds, period, first, tmp_path):
    """The shortest pattern is found, and transformers reads the same layers from what is written back."""
    folder = changed(
        tmp_path, name, layer_types=kinds, num_hidden_layers=len(kinds), sliding_window=6, use_sliding_window=True
    )
    config, original = families.read_config(folder), AutoConfig.from_pretrained(folder)
    assert [spec.window for spec in config.layers] == [6 if kind == LOCAL else None for kind in kinds]
    assert {dataclasses.replace(spec, window=None) for spec in config.pattern} == {plain_layer(name)}
    assert len(config.pattern) == period
    written = export(tmp_path / "written", config)
    assert families.read_config(written) == config
    read = AutoConfig.from_pretrained(written)
    assert read.layer_types == original.layer_types == kinds
    assert read.sliding_window == (6 if LOCAL in kinds else None)
    assert read.max_window_layers == first, "what readers without layer_types go by"


@pytest.mark.parametrize(
    ("family", "specs", "names"),
    [
        ("llama", [LayerSpec(window=3)], "layer 0 has window=3"),
        ("llama", [LayerSpec(qkv_bias=True)], "layer 0 has qkv_bias=True"),
        ("llama", [LayerSpec(scale=0.5)], r"layer 0 has scale=0\.5"),
        ("llama", [LayerSpec(), LayerSpec(rope_theta=7.0)], r"layer 1 has rope_theta=7\.0"),
        ("llama", [LayerSpec(), LayerSpec(activation="gelu_tanh")], "layer 1 has activation='gelu_tanh'"),
        ("mistral", [LayerSpec(window=3), LayerSpec()], "layer 1 has window=None"),
        ("qwen2", [LayerSpec(qkv_bias=True, soft_cap=50.0)], r"layer 0 has soft_cap=50\.0"),
        ("qwen2", [LayerSpec(qkv_bias=True, window=n) for n in (3, 4)], "layer 1 has window=4"),
        ("qwen3", [LayerSpec()], "layer 0 has qk_norm=False"),
        ("gemma2", [LayerSpec(norm_places="around", scale=0.3)], r"layer 0 has scale=0\.3"),
        ("olmo2", [LayerSpec(qk_norm=True, norm_places="after")], "layer 0 has qk_norm_joint=False"),
    ],
)
def test_what_config_json_cannot_express_is_not_exported(family, specs, names, tmp_path):
    config = with_layers(DECODER, *specs, family=family)
    with pytest.raises(UserError, match=rf"config\.json: {names}, which the config\.json of a {family} model cannot"):
        export(tmp_path, config)
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize(
    ("family", "sizes", "names"),
    [
        ("llama", {"final_soft_cap": 30.0}, r"final_soft_cap=30\.0"),
        ("llama", {"norm": "rms_offset"}, "norm='rms_offset'"),
        ("gemma2", {"scale_embedding": False}, "scale_embedding=False"),
        ("gpt_neox", {"num_kv_heads": 4}, "num_kv_heads=4"),
        ("gpt_neox", {"head_dim": 12}, "head_dim=12"),
    ],
)
def test_sizes_that_config_json_cannot_express_are_not_exported(family, sizes, names, tmp_path):
    config = of_family(family, **sizes)
    with pytest.raises(UserError, match=rf"config\.json: the model has {names}, which the config\.json of a {family}"):
        export(tmp_path, config)


def test_exported_config_has_the_keys_of_older_transformers(tmp_path):
    """What version 4 reads in place of rope_parameters."""
    wanted = {
        "llama3": {"rope_theta": 500.0},
        "gemma3": {"rope_theta": 500.0, "rope_local_base_freq": 100.0},
        "gpt_neox": {"rotary_emb_base": 500.0, "rotary_pct": 0.5},
    }
    for name, keys in wanted.items():
        export(tmp_path / name, families.read_config(RECORDED / name))
        written = json.loads((tmp_path / name / "config.json").read_text())
        assert keys.items() <= written.items()
        kind = written.get("rope_scaling", {}).get("rope_type")
        assert kind == {"llama3": "llama3", "gemma3": "linear", "gpt_neox": None}[name]


def test_config_of_older_transformers(tmp_path):
    """Before version 5 rope_theta stood at the top, and fields with defaults could be absent."""
    raw = json.loads((RECORDED / "tied" / "config.json").read_text())
    del raw["rope_parameters"], raw["head_dim"], raw["num_key_value_heads"], raw["dtype"]
    raw |= {"rope_theta": 1234.0, "rope_scaling": None, "torch_dtype": "float16", "transformers_version": "4.31.0"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = families.read_config(tmp_path)
    assert (config.pattern[0].rope_theta, config.head_dim, config.num_kv_heads) == (1234.0, 8, 4)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_scaling_of_older_transformers(key, tmp_path):
    folder = changed(tmp_path, "tied", rope_parameters=None, rope_theta=77.0, rope_scaling={key: "linear", "factor": 2})
    layer = LayerSpec(rope_theta=77.0, rope_scaling=RopeScaling("linear", 2.0))
    assert families.read_config(folder).pattern == (layer,)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0}, [6]),
        ({"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}, [None, 6]),
        ({"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}, [None]),  # from layer 2 on: nowhere
        ({"use_sliding_window": False, "sliding_window": 6, "max_window_layers": 0}, [None]),
    ],
)
def test_windows_of_qwen(changes, windows, tmp_path):
    config = families.read_config(changed(tmp_path, "qwen3", layer_types=None, **changes))
    assert [spec.window for spec in config.pattern] == windows


def test_mistral_without_a_window(tmp_path):
    assert families.read_config(changed(tmp_path, "mistral", sliding_window=None)).pattern == (LayerSpec(),)


def test_missing_config(tmp_path):
    with pytest.raises(UserError, match=r"no model at .*: config\.json is missing"):
        families.read_config(tmp_path)


@pytest.mark.parametrize("content", [b'{"model_type": "llama",', b"[1, 2]", "\ufffe".encode("utf-16"), b""])
def test_broken_config(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json: (broken JSON|not UTF-8 text)"):
        families.read_config(tmp_path)


def rope(kind, **more):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


@pytest.mark.parametrize(
    ("name", "changes", "names"),
    [
        ("tied", {"model_type": "gpt2"}, "model_type 'gpt2' is"),
        ("tied", {"model_type": None}, "model_type None is"),
        ("tied", {"model_type": ["llama"]}, r"model_type \['llama'\] is"),
        ("tied", rope("longrope", factor=2.0, short_factor=[1.0] * 6, long_factor=[1.0] * 6),
         "rope_type='longrope' is"),
        ("tied", rope("default", partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is"),
        ("tied", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is"),
        ("tied", {"attention_bias": True}, "attention_bias=True is"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True is"),
        ("tied", {"mlp_bias": True}, "mlp_bias=True is"),
        ("tied", {"hidden_act": "relu"}, "hidden_act='relu' is"),
        ("tied", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config is"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]},
         "layer_types full_attention, sliding_attention are"),
        ("gemma2", {"attention_bias": True}, "attention_bias=True is"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping=50\.0 is"),
        ("gemma3", {"hidden_activation": "relu"}, "hidden_activation='relu' is"),
        ("gemma3", {"model_type": "gemma3"}, "model_type 'gemma3' is"),
        ("qwen3", {"layer_types": ["linear_attention", "full_attention"]},
         "layer_types full_attention, linear_attention are"),
    ],
)  # fmt: skip
def test_unsupported_option(tmp_path, name, changes, names):
    with pytest.raises(UserError, match=rf"config\.json: {names} not supported"):
        families.read_config(changed(tmp_path, name, **changes))


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"vocab_size": None}, "vocab_size"),
        ({"num_attention_heads": 5, "head_dim": None}, "number of attention heads"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads=0"),
        ({"num_hidden_layers": 0}, "num_layers=0 must be positive"),
        ({"num_key_value_heads": 3}, "num_heads=4 is no multiple of num_kv_heads=3"),
        ({"head_dim": 7}, "head_dim`?=7"),
        (rope("linear"), "factor"),
        (rope("yarn"), "factor"),
        (rope("dynamic"), "factor"),
        (rope("llama3", factor=8.0), "low_freq_factor"),
    ],
)
def test_impossible_values(tmp_path, changes, names):
    with pytest.raises(UserError, match=rf"config\.json: .*{names}"):
        families.read_config(changed(tmp_path, "tied", **changes))


def test_sliding_layers_without_a_window(tmp_path):
    with pytest.raises(UserError, match=r"layer_types has sliding_attention, but .* is not set"):
        families.read_config(changed(tmp_path, "qwen2", layer_types=[FULL, LOCAL], use_sliding_window=True))


@pytest.mark.parametrize("fraction", [0.45, 0.1, 1.5])
def test_a_part_of_a_head_that_cannot_be_rotated(fraction, tmp_path):
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": fraction}
    with pytest.raises(UserError, match=rf"partial_rotary_factor={fraction} rotates .* of head_dim=8, but positions"):
        families.read_config(changed(tmp_path, "gpt_neox", rope_parameters=parameters))


def test_window_that_sees_nothing(tmp_path):
    with pytest.raises(UserError, match="sliding_window=0 must be positive"):
        families.read_config(changed(tmp_path, "mistral", sliding_window=0))
