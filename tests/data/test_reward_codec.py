"""mpo_jax.data.reward_codec: rows of ids as transformers makes them of the same texts, BOS, EOS and cuts."""

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mpo_jax.config.schema import TextConfig
from mpo_jax.data import toy
from mpo_jax.data.reward_codec import RewardCodec
from mpo_jax.data.text import TextCodec
from mpo_jax.data.text_rows import TextReader, TextRow
from mpo_jax.data.tokens import Example
from mpo_jax.errors import UserError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "ab cd"}


def characters(*, bos: bool = True, chat: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of single characters."""
    alphabet = [chr(i) for i in range(32, 127)]
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(["<s>", "</s>", "?", *alphabet])}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")  # type: ignore[assignment]
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
            single="<s> $A </s>" if eos else "<s> $A", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="?")
    if chat:
        made.chat_template = TEMPLATE
    return made


def ids(codec: RewardCodec, *rows: TextRow) -> list[list[int]]:
    examples, _ = codec.examples(rows)
    assert all(len(example.responses) == 1 and len(example.responses[0]) == 1 for example in examples)
    return [[*map(int, example.prompt), int(example.responses[0][0])] for example in examples]


def test_a_conversation_is_what_the_template_makes_of_it():
    """As `apply_chat_template` tokenizes it whole: no second BOS, the template's end of turn last."""
    tokenizer = characters(chat=True)
    row = TextRow((USER,), "yes", True)
    turns = [USER, {"role": "assistant", "content": "yes"}]
    expected = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert ids(RewardCodec(tokenizer, 100), row) == [expected]
    assert expected[0] == 0 and expected.count(0) == 1 and expected[-1] == 1


def test_a_system_turn_that_the_template_refuses_goes_into_the_user_s():
    tokenizer = characters(chat=True)
    row = TextRow(({"role": "system", "content": "s"}, USER), "yes", True)
    folded = [{"role": "user", "content": "s\n\nab cd"}, {"role": "assistant", "content": "yes"}]
    assert ids(RewardCodec(tokenizer, 100), row) == [
        tokenizer.apply_chat_template(folded, tokenize=True, return_dict=False)
    ]


def test_plain_text_has_the_special_tokens_of_the_tokenizer_and_an_end():
    """BOS where the tokenizer adds it; EOS after a complete response alone, and once."""
    whole, cut = TextRow("ab", " c", True), TextRow("ab", " c", False)
    for tokenizer in (characters(), characters(bos=False), characters(eos=True)):
        plain = tokenizer("ab c").input_ids
        ended = plain if plain[-1] == 1 else [*plain, 1]
        # a tokenizer that ends every text ends one that was cut, too: then the model would take it for complete
        assert ids(RewardCodec(tokenizer, 100), whole, cut) == [ended, ended[:-1]]
    template = RewardCodec(characters(), 100, template="Q{}A".format)
    assert ids(template, cut) == [characters()("QabA c").input_ids]
    no_eos = characters(bos=False)
    no_eos.eos_token = None
    assert ids(RewardCodec(no_eos, 100), whole) == [no_eos("ab c").input_ids]


def test_a_cut_reply_of_a_conversation_ends_where_it_was_cut():
    """Its whole form, up to the reply; a reply that the template strips, or that is empty, too."""
    tokenizer = characters(chat=True)
    tokenizer.chat_template = TEMPLATE.replace("m['content'] }}", "m['content'] | trim }}")
    for reply in ("yes", " y ", ""):
        row = TextRow((USER,), reply, True)
        whole, cut = ids(RewardCodec(tokenizer, 100), row, TextRow((USER,), reply, False))
        turns = [USER, {"role": "assistant", "content": reply}]
        assert whole == tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
        assert cut == whole[:-1] and whole[-1] == 1


def test_special_tokens_in_a_response_stay_text_and_one_bos_is_enough():
    """In a prompt a template may write them; a "</s>" in a response must not end it."""
    tokenizer = characters(chat=True)
    spelled = tokenizer("a</s>b", add_special_tokens=False, split_special_tokens=True).input_ids
    assert 1 not in spelled and len(spelled) == 6
    plain, chat = TextRow("x", "a</s>b", True), TextRow((USER,), "a</s>b", True)
    codec = RewardCodec(tokenizer, 100)
    assert ids(codec, plain) == [[*tokenizer("x").input_ids, *spelled, 1]]
    assert ids(codec, TextRow("x</s>", "a</s>b", False)) == [[0, *tokenizer("x").input_ids[1:], 1, *spelled]]
    turns = [USER, {"role": "assistant", "content": "@"}]
    around = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    place = around.index(tokenizer.convert_tokens_to_ids("@"))
    assert ids(codec, chat) == [[*around[:place], *spelled, *around[place + 1 :]]]
    assert ids(codec, TextRow("<s>x", "y", True)) == ids(codec, TextRow("x", "y", True))


def test_a_long_row_loses_the_start_of_its_prompt_behind_bos():
    rows = [TextRow("abcdef", "gh", True), TextRow("a", "b", True)]
    long = characters()("abcdefgh").input_ids
    codec = RewardCodec(characters(), 6)
    assert codec.examples(rows)[1] == 1
    assert ids(codec, *rows)[0] == [0, *long[-4:], 1]
    plain = RewardCodec(characters(bos=False), 6)
    assert ids(plain, *rows)[0] == [*long[-5:], 1]


def test_rows_of_both_kinds_keep_their_order():
    codec = RewardCodec(characters(chat=True), 100)
    rows = [TextRow("a", "b", True), TextRow((USER,), "c", True), TextRow("d", "e", False)]
    assert ids(codec, *rows) == [ids(codec, row)[0] for row in rows]


def test_what_cannot_become_a_row_is_said():
    with pytest.raises(UserError, match=r"the judge has a tokenizer of its own without a chat template"):
        RewardCodec(characters(), 100, name="the judge").examples([TextRow((USER,), "yes", True)])
    with pytest.raises(UserError, match=r"prompt and response together are 1 of its tokens"):
        RewardCodec(characters(bos=False), 100).examples([TextRow("a", "", False)])


def test_a_policy_s_ids_are_read_as_text():
    """Up to the end token, which says that the response is complete; a conversation's turns by its rendered prompt."""
    codec = TextCodec(toy.make_tokenizer(), TextConfig())
    said = codec.response(" my boss")
    reader = TextReader(codec, {"rendered": (USER,)})
    examples = [Example([1], [said.ids, said.ids[:-1]]), Example([1], [said.ids, np.asarray([codec.eos_id])])]
    assert reader.rows(["plain", "rendered"], examples) == [
        TextRow("plain", " my boss", True),
        TextRow("plain", " my boss", False),
        TextRow((USER,), "my boss", True),
        TextRow((USER,), "", True),
    ]
