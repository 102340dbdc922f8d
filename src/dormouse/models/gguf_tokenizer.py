"""The tokenizer of a GGUF file as `tokenizer.json` and `tokenizer_config.json`.

Built on the `tokenizers` library. transformers has a converter of its own, but it is private, moves
between releases, and falls back to GPT-2's splitting where it does not know the file's (SmolLM2's
digits among them): other tokens than the model was trained on, and no error.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer

from dormouse.domain.errors import ModelError, UnsupportedModel
from dormouse.models.gguf_file import GgufFile

_SPACE = "\u2581"
_LONGEST_TOKEN = 1024
"""In characters. To find a vocabulary's merges takes the square of it."""

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class _Splitting:
    """How a byte-level vocabulary cuts text before merging. `regex` None is GPT-2's own pattern."""

    regex: str | None = None
    single_digits: bool = False
    compose: bool = False
    whole_words_first: bool = False

    def pre_tokenizer(self) -> PreTokenizer:
        """The cut, ending in the byte alphabet."""
        steps: list[PreTokenizer] = []
        if self.single_digits:
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        if self.regex:
            steps.append(pre_tokenizers.Split(Regex(self.regex), "isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.regex is None))
        return pre_tokenizers.Sequence(steps)


_GPT2 = _Splitting()
_LLAMA3 = _Splitting(_LLAMA3_SPLIT, whole_words_first=True)
_QWEN2 = _Splitting(_QWEN2_SPLIT, compose=True)
_SPLITTINGS = {
    "default": _GPT2,
    "gpt-2": _GPT2,
    "smollm": _Splitting(single_digits=True),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "pixtral": _LLAMA3,
    "tekken": _Splitting(_TEKKEN_SPLIT, whole_words_first=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


class _Kind(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The file's tokens by id, and what each is."""

    tokens: list[str]
    kinds: list[int]

    def ids(self) -> dict[str, int]:
        """Token to id."""
        return {token: index for index, token in enumerate(self.tokens)}

    def of_kind(self, *kinds: _Kind) -> Iterator[str]:
        """The tokens of these kinds, by id."""
        return (token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind in kinds)


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer that the file describes.

    Raises UnsupportedModel naming a tokenizer or pre-tokenizer that is not known, ModelError when the
    vocabulary contradicts itself.
    """
    kind = file.text("tokenizer.ggml.model")
    vocabulary = _vocabulary(file)
    if kind == "gpt2":
        tokenizer = _byte_level(file, vocabulary)
    elif kind == "llama":
        vocabulary = _Vocabulary([_spelled(token) for token in vocabulary.tokens], vocabulary.kinds)
        tokenizer = _sentencepiece(file, vocabulary)
    else:
        raise UnsupportedModel(f"{file.path} has a tokenizer of type {kind}; gpt2 and llama can be imported")
    special = vocabulary.of_kind(_Kind.CONTROL, _Kind.UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    defined = (token for token in vocabulary.of_kind(_Kind.USER_DEFINED) if token.strip(_SPACE))
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in defined])
    if tokenizer.get_vocab_size(with_added_tokens=True) != len(vocabulary.tokens):
        raise ModelError(
            f"{file.path}: its special tokens are not in its own vocabulary; the file is damaged"
        )
    _add_bos_and_eos(file, vocabulary, tokenizer)
    return tokenizer


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """`tokenizer_config.json`: special tokens by role, and the chat template if there is one."""
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds(file, "bos"),
        "add_eos_token": _adds(file, "eos"),
    }
    tokens = file.items("tokenizer.ggml.tokens", str)
    for role in ("bos", "eos", "unk", "pad"):
        token_id = special_id(file, role)
        config[f"{role}_token"] = None if token_id is None else tokens[token_id]
    if template := file.text("tokenizer.chat_template", ""):
        config["chat_template"] = template
    return config


def special_id(file: GgufFile, role: str) -> int | None:
    """The id of the `bos`, `eos`, `eot`, `unk` or `pad` token, if the file declares one.

    Raises ModelError when the id is outside of the vocabulary.
    """
    long_name = {"unk": "unknown", "pad": "padding"}.get(role, role)
    key = f"tokenizer.ggml.{long_name}_token_id"
    if key not in file.metadata:
        return None
    token_id = file.integer(key)
    if not 0 <= token_id < len(file.items("tokenizer.ggml.tokens", str)):
        raise ModelError(f"{file.path}: {key} {token_id} is outside of the vocabulary; the file is damaged")
    return token_id


def _vocabulary(file: GgufFile) -> _Vocabulary:
    tokens = file.items("tokenizer.ggml.tokens", str)
    if "tokenizer.ggml.token_type" in file.metadata:
        kinds = file.items("tokenizer.ggml.token_type", int)
    else:
        kinds = [int(_Kind.NORMAL)] * len(tokens)
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens):
        raise ModelError(
            f"{file.path}: {len(tokens)} tokens, {len(set(tokens))} of them different, with {len(kinds)} "
            "types; the file is damaged"
        )
    if longest := next((token for token in tokens if len(token) > _LONGEST_TOKEN), ""):
        raise ModelError(f"{file.path}: a token has {len(longest)} characters; the file is damaged")
    return _Vocabulary(tokens, kinds)


def _byte_level(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    name = file.text("tokenizer.ggml.pre", "default")
    splitting = _SPLITTINGS.get(name)
    if splitting is None:
        known = ", ".join(sorted(_SPLITTINGS))
        raise UnsupportedModel(f"{file.path} has the pre-tokenizer {name}; {known} can be imported")
    merges = _stored_merges(file)
    model = _bpe(file, vocabulary, merges, ignore_merges=splitting.whole_words_first)
    tokenizer = Tokenizer(model)
    if splitting.compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(file: GgufFile, vocabulary: _Vocabulary) -> Tokenizer:
    prefix = file.flag("tokenizer.ggml.add_space_prefix", True)
    unknown = next(vocabulary.of_kind(_Kind.UNKNOWN), None)
    merges = (
        _stored_merges(file) if "tokenizer.ggml.merges" in file.metadata else _scored_merges(file, vocabulary)
    )
    model = _bpe(file, vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    to_mark = normalizers.Replace(" ", _SPACE)
    from_bytes = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), to_mark])
        tokenizer.decoder = decoders.Sequence([*from_bytes, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = to_mark
        tokenizer.decoder = decoders.Sequence(from_bytes)
    return tokenizer


def _spelled(token: str) -> str:
    """Runs of spaces are stored as spaces, while the vocabulary proper marks every space."""
    return _SPACE * len(token) if token and not token.strip(" ") else token


def _bpe(
    file: GgufFile, vocabulary: _Vocabulary, merges: list[tuple[str, str]], **options: Any
) -> models.BPE:
    try:
        return models.BPE(vocab=vocabulary.ids(), merges=merges, **options)
    except Exception as error:  # all that tokenizers raises
        raise ModelError(f"{file.path}: its merges contradict its vocabulary ({error})") from error


def _stored_merges(file: GgufFile) -> list[tuple[str, str]]:
    pairs = [merge.split(" ") for merge in file.items("tokenizer.ggml.merges", str)]
    if any(len(pair) != 2 for pair in pairs):
        raise ModelError(f"{file.path}: a merge is not two tokens; the file is damaged")
    return [(left, right) for left, right in pairs]


def _scored_merges(file: GgufFile, vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """Every pair that makes a token, best first.

    Sentencepiece always merges the pair with the best score, after it matched what the user defined.
    """
    scores = file.items("tokenizer.ggml.scores", float)
    if len(scores) != len(vocabulary.tokens):
        raise ModelError(f"{file.path}: {len(scores)} scores for {len(vocabulary.tokens)} tokens")
    ids = vocabulary.ids()
    ranked: list[tuple[bool, float, int, int, int, tuple[str, str]]] = []
    mergeable = (_Kind.NORMAL, _Kind.USER_DEFINED, _Kind.UNUSED)
    for index, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        if kind not in mergeable:
            continue
        for left, right in _splits(token):
            if left in ids and right in ids:
                pair = (left, right)
                rank = (kind != _Kind.USER_DEFINED, -scores[index], index, ids[left], ids[right], pair)
                ranked.append(rank)
    ranked.sort()
    return [pair for *_, pair in ranked]


def _splits(token: str) -> Iterator[tuple[str, str]]:
    return ((token[:cut], token[cut:]) for cut in range(1, len(token)))


def _add_bos_and_eos(file: GgufFile, vocabulary: _Vocabulary, tokenizer: Tokenizer) -> None:
    added = {role: special_id(file, role) for role in ("bos", "eos") if _adds(file, role)}
    present = {role: index for role, index in added.items() if index is not None}
    if not present:
        return
    names = {role: vocabulary.tokens[index] for role, index in present.items()}
    pieces = [names.get("bos"), "$A", names.get("eos")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[piece for piece in pieces if piece is not None],
        special_tokens=[(names[role], index) for role, index in present.items()],
    )


def _adds(file: GgufFile, role: str) -> bool:
    # llama.cpp adds BOS to a sentencepiece vocabulary that does not say otherwise.
    default = role == "bos" and file.text("tokenizer.ggml.model") == "llama"
    return file.flag(f"tokenizer.ggml.add_{role}_token", default)
