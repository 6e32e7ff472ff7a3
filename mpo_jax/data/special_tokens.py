"""Text that spells a tokenizer's special tokens, such as a response that ends with `<|im_end|>`."""

from transformers import PreTrainedTokenizerBase


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer reads as special tokens, without blank ones; longer ones first."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({text for text in (*tokenizer.all_special_tokens, *added) if text.strip()}, key=len, reverse=True)
