"""The text that a class-conditional model is told: a class's name as token ids.

The authors' models read the name of the class's folder through LLaMA's tokenizer, whose file is not ours to pass on:
the user brings it. Our own small models know a few whole words, which their bundles list.
"""

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nbp_engines.errors import EngineError
from nbp_engines.spec import SystemSpec
from nbp_errors import UsageError

# LLaMA's ids of the tokens that begin and end a text, and how both kinds of file spell them.
BEGIN, END = 1, 2
SPELLED = {BEGIN: "<s>", END: "</s>"}


def class_ids(name: str, spec: SystemSpec, words: Sequence[str], tokenizer: Path | None) -> np.ndarray:
    """Text ids, int64 [spec.text_tokens], of a class such as ApplyEyeMakeup: split at capitals, in lower case.

    With `words`, each word's id is its index there, and 0 fills the rest. Without, `tokenizer` is LLaMA's, either its
    SentencePiece model or its `tokenizer.json`: begin-of-text comes first and end-of-text fills the rest.

    Raises UsageError for an unknown word and for a missing or wrong tokenizer, EngineError if its package is missing.
    """
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower().split()
    if not text:
        raise UsageError(f"class {name!r} has no words")
    if words and tokenizer:
        raise UsageError(f"this model has words of its own and no use for a text tokenizer: leave out {tokenizer}")
    if words:
        ids, fill = [_word_id(word, words) for word in text], 0
    elif tokenizer:
        ids, fill = [BEGIN, *_load(tokenizer, spec.text_vocab)(" ".join(text))], END
    else:
        raise UsageError(
            "this model reads a class's name through LLaMA's tokenizer, which no bundle holds: give its "
            f"tokenizer.model or tokenizer.json as --text-tokenizer FILE, or {spec.text_tokens} ids as --text-ids"
        )
    padded = [*ids, *[fill] * spec.text_tokens][: spec.text_tokens]
    return np.array(padded, np.int64)


def listed_ids(text: str, spec: SystemSpec) -> np.ndarray:
    """Text ids, int64 [spec.text_tokens], written out as in `5,0,0,0,0,0,0,0`.

    Raises UsageError if they are another number of ids, or none that the model has.
    """
    parts = text.split(",")
    if len(parts) != spec.text_tokens:
        raise UsageError(f"text ids {text}: {len(parts)} of them, the model takes exactly {spec.text_tokens}")
    wrong = [part for part in parts if not re.fullmatch(r"\s*\d{1,9}\s*", part) or int(part) >= spec.text_vocab]
    if wrong:
        raise UsageError(f"text id {wrong[0]!r} is none: they reach from 0 to {spec.text_vocab - 1}")
    return np.array([int(part) for part in parts], np.int64)


def _word_id(word: str, words: Sequence[str]) -> int:
    known = list(words[1:])  # the first one ends a text
    if word in known:
        return known.index(word) + 1
    meant = get_close_matches(word, known, n=1)
    hint = f"did you mean {meant[0]!r}? " if meant else ""
    raise UsageError(f"no class {word!r}: {hint}there are {', '.join(known)}")


class _Tokenizer(NamedTuple):
    """What both packages offer: the size, ids of a text without special tokens, and an id's spelling."""

    size: int
    encode: Callable[[str], list[int]]
    spell: Callable[[int], str | None]


def _load(path: Path, vocab: int) -> Callable[[str], list[int]]:
    """The encoder of a tokenizer's file, of either kind, once it has proved to be of LLaMA's layout."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file: --text-tokenizer takes LLaMA's tokenizer.model or tokenizer.json")
    content = path.read_bytes()
    package, open_file = ("tokenizers", _from_json) if content.lstrip()[:1] == b"{" else ("sentencepiece", _from_model)
    try:
        found = open_file(content)
    except ModuleNotFoundError:
        raise EngineError(f"reading {path} needs {package}: pip install 'nbp-export[text]'") from None
    except Exception as error:  # neither package has a base of its own for its errors
        raise UsageError(f"{path} is neither a SentencePiece model nor a tokenizer.json: {error}") from error
    if found.size > vocab:
        raise UsageError(f"{path} has {found.size} ids, the model only {vocab}: it was trained with another tokenizer")
    for token, spelled in SPELLED.items():
        if token >= found.size or found.spell(token) != spelled:
            raise UsageError(f"{path} is not LLaMA's tokenizer: its id {token} is not {spelled}")
    return found.encode


def _from_model(content: bytes) -> _Tokenizer:
    from sentencepiece import SentencePieceProcessor

    if not content:
        raise ValueError("it is empty")
    model = SentencePieceProcessor(model_proto=content)
    return _Tokenizer(model.vocab_size(), lambda text: list(model.encode(text)), model.id_to_piece)


def _from_json(content: bytes) -> _Tokenizer:
    from tokenizers import Tokenizer

    model = Tokenizer.from_str(content.decode())
    # Settings of whoever saved the file: length and padding are ours to choose.
    model.no_truncation()
    model.no_padding()
    return _Tokenizer(
        model.get_vocab_size(),
        # A file may or may not put begin-of-text first; without special tokens it never does.
        lambda text: list(model.encode(text, add_special_tokens=False).ids),
        model.id_to_token,
    )
