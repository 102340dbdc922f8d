"""Encoding by pieces gives the ids of the whole, whatever the tokenizer does before it merges."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers

from dormouse.domain.errors import InvalidRequest
from dormouse.models.chat import ChatModel
from dormouse.models.folder import TOKENIZER, ModelFolder
from dormouse.models.pieces import PieceEncoder, border

SPECIAL = ("<|start|>", "<|end|>", "</s>", "<s>")
WORDS = ("user\n", "a", "  b", " ", "\n\n", "42", "é", "🦫", "<", "<|", "|>", "<|start", "Ab", "x" * 70)


def bpe() -> Tokenizer:
    """Merges whatever it can, also across what looks like borders."""
    vocab = {character: index for index, character in enumerate(map(chr, range(0x20, 0x180)))} | {"▁": 1000}
    merges = [("a", "b"), ("<", "|"), ("x", "x"), ("▁", "a"), ("▁", "▁"), ("|", ">"), ("4", "2"), ("Ġ", "b")]
    for left, right in merges:
        vocab.setdefault(left, len(vocab) + 1000)
        vocab[left + right] = len(vocab) + 2000
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def with_prefix(scheme: str) -> Tokenizer:
    tokenizer = bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def with_normalizers() -> Tokenizer:
    tokenizer = bpe()
    parts = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(parts)
    return tokenizer


def with_byte_level(*, prefix: bool) -> Tokenizer:
    tokenizer = bpe()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    return tokenizer


def with_greedy_tokens() -> Tokenizer:
    """Added tokens that take in spaces, want whole words, and run into the special ones."""
    tokenizer = bpe()
    tokenizer.add_special_tokens([AddedToken("<|end|> a", special=True, normalized=False, lstrip=True)])
    tokenizer.add_tokens([AddedToken("b</s", normalized=False), AddedToken("user", single_word=True)])
    return tokenizer


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "plain": bpe,
    "first": partial(with_prefix, "first"),
    "always": partial(with_prefix, "always"),
    "normalized": with_normalizers,
    "bytes": partial(with_byte_level, prefix=False),
    "bytes after a space": partial(with_byte_level, prefix=True),
    "greedy": with_greedy_tokens,
}


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


TEXTS = st.lists(st.sampled_from([*SPECIAL, *WORDS]), max_size=30).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts=st.lists(TEXTS, min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_pieces_are_the_whole(name: str, texts: list[str]) -> None:
    tokenizer = TOKENIZERS[name]()
    encoder = PieceEncoder(tokenizer, partial(whole, tokenizer))
    for text in (*texts, *texts):
        assert encoder.encode(text, "tenant") == whole(tokenizer, text)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.sampled_from([*WORDS, "<|im_start|>", "<|im_end|>", "<repo_name>"]), max_size=30))
def test_pieces_are_the_whole_for_the_real_model(smollm2: ModelFolder, words: list[str]) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2.path / TOKENIZER))
    encoder = PieceEncoder(tokenizer, partial(whole, tokenizer))
    text = "".join(words)
    assert encoder.encode(text, "tenant") == encoder.encode(text, "tenant") == whole(tokenizer, text)


def test_only_what_is_new_is_encoded() -> None:
    asked: list[str] = []
    tokenizer = bpe()

    def encode(text: str) -> list[int]:
        asked.append(text)
        return whole(tokenizer, text)

    encoder = PieceEncoder(tokenizer, encode)
    system, user = "<|start|>" + "a b " * 40, "<|start|>" + "c d " * 40
    encoder.encode(system + user, "one")
    encoder.encode(system + user + "<|end|>more", "one")
    assert asked == [system, user, "<|end|>more"]
    encoder.encode(system, "two")
    assert asked[-1] == system, "what another tenant sent is not known to this one"


def test_tokens_that_another_one_could_run_into_are_no_borders() -> None:
    def cuts(tokenizer: Tokenizer) -> list[str]:
        found = border(tokenizer)
        return [] if found is None else [token for token in SPECIAL if found.fullmatch(token)]

    assert cuts(bpe()) == list(SPECIAL)
    assert cuts(with_greedy_tokens()) == []
    assert border(Tokenizer(models.BPE({"a": 0}, []))) is None


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dormouse.models.pieces._CAPACITY", 1000)
    tokenizer = bpe()
    encoder = PieceEncoder(tokenizer, partial(whole, tokenizer))
    for number in range(50):
        encoder.encode(f"<|start|>{number:03}" + "a" * 200, "tenant")
        assert encoder.num_characters <= 1000
    assert encoder.num_characters > 500


def test_text_that_is_no_unicode_is_refused(byte_level_chat: ChatModel) -> None:
    with pytest.raises(InvalidRequest, match="surrogates"):
        byte_level_chat.encode_prompt("a\ud800", "tenant")
