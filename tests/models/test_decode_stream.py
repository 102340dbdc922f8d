"""A stream's text equals the decode of the whole, whatever the ids; and it never shows half a character."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from dormouse.domain.errors import UnsupportedModel
from dormouse.models.chat import ChatModel
from dormouse.models.chat_template import ChatTemplate
from dormouse.models.decode_stream import DecodeStream, decoder_of
from dormouse.models.folder import ModelFolder

LETTERS = st.one_of(st.characters(codec="utf-8"), st.sampled_from("🦫👩\u200d👧日本語é\n \t1"))
TEXTS = st.text(alphabet=LETTERS, max_size=40)
BYTES = st.one_of(st.integers(0x80, 0xFF), st.sampled_from(b"a \xf0\x9f\xa6\xab"))
VOCABULARIES = ["byte_level", "sentencepiece"]


@pytest.fixture(scope="module", params=VOCABULARIES)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    folder: ModelFolder = request.getfixturevalue(f"{request.param}_folder")
    return Tokenizer.from_file(str(folder.path / "tokenizer.json"))


@pytest.fixture(scope="module")
def byte_ids(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The first token that stands for each run of bytes."""
    decoder = decoder_of(tokenizer)
    return {decoder.token_bytes(i): i for i in reversed(range(tokenizer.get_vocab_size()))}


def pushed(stream: DecodeStream, ids: list[int]) -> list[str]:
    return [*map(stream.push, ids), stream.flush()]


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_give_the_text_of_the_whole(tokenizer: Tokenizer, data: st.DataObject) -> None:
    # A few ids past the vocabulary: a model's logits may have more columns than there are tokens.
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() + 2), max_size=60))
    assert "".join(pushed(decoder_of(tokenizer).stream(), ids)) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_bytes_in_any_order_give_the_text_of_the_whole(
    tokenizer: Tokenizer, byte_ids: dict[bytes, int], data: st.DataObject
) -> None:
    # Random ids seldom make long characters, so here every id is one byte, and few of them ASCII.
    ids = [byte_ids[bytes((byte,))] for byte in data.draw(st.lists(BYTES, max_size=30))]
    assert "".join(pushed(decoder_of(tokenizer).stream(), ids)) == tokenizer.decode(ids)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_valid_text_streams_without_replacement_characters(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "").replace("▁", "")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = pushed(decoder_of(tokenizer).stream(), ids)
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_bytes_of_tokens_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    text = "a" + text.replace("▁", "")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    joined = b"".join(map(decoder_of(tokenizer).token_bytes, ids)).decode()
    assert joined.removeprefix(" ") == text


def test_an_emoji_appears_at_its_last_byte(byte_level_chat: ChatModel, sentencepiece_chat: ChatModel) -> None:
    for chat in (byte_level_chat, sentencepiece_chat):
        stream = chat.decode_stream()
        ids = chat.encode("a👍b", add_special_tokens=False)
        pieces = [stream.push(token_id) for token_id in ids]
        assert "👍" in "".join(pieces)
        assert [piece for piece in pieces if piece] in (["a", "👍", "b"], ["a", "👍b"])


def test_the_end_of_a_reply_is_not_swallowed(
    byte_level_chat: ChatModel, sentencepiece_chat: ChatModel
) -> None:
    for chat, shown in ((byte_level_chat, "\ufffd"), (sentencepiece_chat, "\ufffd" * 3)):
        stream = chat.decode_stream()
        unfinished = chat.encode("👍", add_special_tokens=False)[:-1]
        assert [stream.push(token_id) for token_id in unfinished if token_id] == [""] * len(unfinished)
        assert stream.flush() == shown


def test_special_tokens_show_in_logprobs_and_not_in_text(byte_level_chat: ChatModel) -> None:
    ids = byte_level_chat.encode("<|im_start|>hm<think><|im_end|>")
    assert byte_level_chat.decode(ids) == "hm<think>"
    assert byte_level_chat.token_text(ids[0]) == "<|im_start|>"
    assert byte_level_chat.token_bytes(ids[-1]) == b"<|im_end|>"
    assert byte_level_chat.token_bytes(10**6) == b""
    half = byte_level_chat.encode("é", add_special_tokens=False)
    assert "".join(map(byte_level_chat.token_text, half)) in ("é", "\ufffd\ufffd")


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.Sequence([decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 0, 1)]),
    ],
)
def test_decoders_that_cannot_stream_are_refused(decoder: decoders.Decoder | None) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(UnsupportedModel, match="tokenizer"):
        ChatModel(tokenizer, ChatTemplate({}, {}), frozenset())


def test_special_tokens_show_where_that_is_asked_for(tokenizer: Tokenizer) -> None:
    added = tokenizer.get_added_tokens_decoder()
    special = [token_id for token_id, token in added.items() if token.special]
    first, *others = special
    ids = [*tokenizer.encode("a", add_special_tokens=False).ids, *special]
    text = tokenizer.decode(ids[: -len(special)])
    assert "".join(pushed(decoder_of(tokenizer, {first}).stream(), ids)) == text + added[first].content
    assert "".join(pushed(decoder_of(tokenizer).stream(), [first, *others])) == ""
