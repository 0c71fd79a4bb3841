"""Small vocabularies in the stock tokenizer classes: known words are one token, others fall apart.

CLIP: byte-level BPE whose merges build exactly the known words; anything else becomes bytes.
T5: a unigram model over the known words and single characters; a character it has never seen
becomes the unknown token.
"""

from __future__ import annotations

import string

from transformers import CLIPTokenizer, T5TokenizerFast

CLIP_LENGTH = 40
T5_LENGTH = 32
T5_EXTRA_IDS = 0


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins that byte-level BPE uses for bytes, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted: dict[int, int] = {}
    for byte in range(256):
        if byte not in printable:
            shifted[byte] = 256 + len(shifted)
    return [chr(shifted.get(byte, byte)) for byte in range(256)]


def word_merges(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Pieces and merges by which byte-pair encoding turns each word into a single token.

    A word is first encoded with the merges found so far; what is left is joined left to right by
    new merges. These rank below the earlier ones, so that no earlier word is disturbed.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            known = [pair for pair in zip(symbols, symbols[1:], strict=False) if pair in ranks]
            pair = min(known, key=ranks.__getitem__) if known else (symbols[0], symbols[1])
            ranks.setdefault(pair, len(ranks))
            symbols = merge(symbols, pair)
    return list(dict.fromkeys(left + right for left, right in ranks)), list(ranks)


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """``symbols`` with every adjacent occurrence of ``pair`` joined."""
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def clip_tokenizer(words: list[str]) -> CLIPTokenizer:
    """Lower-casing BPE tokenizer of ``words``; vocabulary: bytes, bytes at word end, pieces."""
    alphabet = byte_alphabet()
    pieces, merges = word_merges(sorted({w.lower() for w in words}))
    tokens = [*alphabet, *(a + "</w>" for a in alphabet), *pieces]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)


def t5_tokenizer(words: list[str]) -> T5TokenizerFast:
    """Case-sensitive unigram tokenizer of ``words`` and their capitalised forms."""
    known = sorted({*words, *(w.capitalize() for w in words)})
    characters = [c for c in string.printable if not c.isspace()]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0)]
    vocab += [("▁" + word, -1.0) for word in known]
    vocab += [(character, -8.0) for character in characters]
    return T5TokenizerFast(vocab=vocab, extra_ids=T5_EXTRA_IDS, model_max_length=T5_LENGTH)
