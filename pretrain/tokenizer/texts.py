"""What both kinds of tokenizers know about text: texts that are hard to keep, and what continues a word."""

import unicodedata
from typing import NamedTuple

# What a tokenizer's file is called where it travels with shards and runs: of sentencepiece.py and of huggingface.py.
TOKENIZER_NAMES = ("tokenizer.model", "hf_tokenizer.json")
TRICKY_TEXTS = (
    "",
    " ",
    "  two  leading, three   inside, one trailing ",
    "\ttabs\t\tand \t spaces\n\n\nblank lines\n",
    "windows\r\nlines\r\n and old mac\rlines",
    "def f(x):\n    if x >= 10:\n\t\treturn {'a': [1, 2.5e-3], \"b\": None}  # what?!\n",
    "nul \0 inside, \x01\x1b\x7f control, \u200b\ufeff\u00ad unseen",
    "中文字符，没有空格。日本語とひらがな、한국어 텍스트",
    "🎉👩\u200d👩\u200d👧\u200d👦🏳️\u200d🌈 👍🏽",
    "e\u0301 n\u0303 \u0300alone, \u00e9 composed, ﬁ ligature, ① ½ Å Ⅷ",
    "\u00a0\u2003\u3000\u2028\u2029\x85 strange spaces",
    "the special <s> and </s> and <unk><pad><mask><cls><sep>",
    "[CLS] the [MASK] of [SEP][PAD][UNK]",
    "<|endoftext|> <|begin_of_text|><|im_start|>user<|im_end|>",
    "<0x41><0x0A> ##ing Ġword </w>",
    "1234567890 3.14159 2026-01-31 1,000,000",
    "a\u2581b \u2581 \u2582",
    "العربية עברית हिन्दी ไทย ру́сский Ελληνικά",
    "Don't we'll I'VE _snake_case camelCase HTTPServer2 naïve",
    "supercalifragilistic" * 60,
    "\U0010ffff\U000e0001 \ufffd \ud7ff",
)


class SpecialToken(NamedTuple):
    """A token that is no text, and whether it takes in the spaces before and after it."""

    text: str
    id: int
    takes_before: bool = False
    takes_after: bool = False


def continues_word(piece: bytes) -> bool:
    """Whether the bytes of a token go on with the word of the token before: no space in front, then a letter or digit.

    A token may begin inside a character, and goes on with it; or end inside its first one, whose first byte then tells
    the script. Where words are not parted by spaces (Chinese, Japanese), each character is a word.
    """
    if not piece or 0x80 <= piece[0] < 0xC0:
        return bool(piece)
    text = piece[:4].decode(errors="ignore")
    if not text:
        return piece[0] < 0xE0  # Latin, Greek, Cyrillic, Hebrew, Arabic
    first = text[0]
    is_chinese = "\u2e80" <= first <= "\ua4cf" or "\uf900" <= first <= "\ufaff" or first >= "\U00020000"
    is_accent = unicodedata.category(first).startswith("M")
    return is_accent or (first.isalnum() and not is_chinese)
