"""The text that conditions a class-conditional model: the name of a class as text ids.

The authors' models take the name of the class's folder, tokenized with LLaMA's tokenizer. Its licence does not let us
distribute the file, so the user has to supply it. Our own small models know a few whole words, which their bundles
list.
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

# LLaMA's ids of the tokens begin-of-text and end-of-text, and their spelling in both kinds of tokenizer file.
BEGIN, END = 1, 2
SPELLINGS = {BEGIN: "<s>", END: "</s>"}


def class_ids(name: str, spec: SystemSpec, words: Sequence[str], tokenizer: Path | None) -> np.ndarray:
    """Return the text ids, int64 [spec.text_tokens], of a class.

    Args:
        name: a name such as ApplyEyeMakeup. It is split at capital letters and put in lower case.
        spec: the static numbers of the bundle.
        words: the words of a model that has its own. The id of a word is its index, and 0 fills the rest of the text.
        tokenizer: for a model without words of its own, LLaMA's `tokenizer.model` or `tokenizer.json`. The text begins
            with begin-of-text, and end-of-text fills the rest.

    Raises UsageError for an unknown word and for a missing or wrong tokenizer, and EngineError if the package that
    reads the tokenizer is not installed.
    """
    text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).lower().split()
    if not text:
        raise UsageError(f"class {name!r} has no words")
    if words and tokenizer:
        raise UsageError(f"the model has its own words and needs no text tokenizer: leave out {tokenizer}")
    if words:
        ids, padding = [_word_id(word, words) for word in text], 0
    elif tokenizer:
        ids, padding = [BEGIN, *_load(tokenizer, spec.text_vocab)(" ".join(text))], END
    else:
        raise UsageError(
            "the model needs LLaMA's tokenizer for the name of a class, and bundles do not contain it: give its "
            f"tokenizer.model or tokenizer.json as --text-tokenizer FILE, or {spec.text_tokens} ids as --text-ids"
        )
    padded = [*ids, *[padding] * spec.text_tokens][: spec.text_tokens]
    return np.array(padded, np.int64)


def listed_ids(text: str, spec: SystemSpec) -> np.ndarray:
    """Return the text ids, int64 [spec.text_tokens], of a comma-separated list such as `5,0,0,0,0,0,0,0`.

    Raises UsageError for a wrong number of ids and for an id that the model does not have.
    """
    parts = text.split(",")
    if len(parts) != spec.text_tokens:
        raise UsageError(f"{len(parts)} text ids in {text}, but the model takes exactly {spec.text_tokens}")
    wrong = [part for part in parts if not re.fullmatch(r"\s*\d{1,9}\s*", part) or int(part) >= spec.text_vocab]
    if wrong:
        raise UsageError(f"{wrong[0]!r} is not a text id: give whole numbers from 0 to {spec.text_vocab - 1}")
    return np.array([int(part) for part in parts], np.int64)


def _word_id(word: str, words: Sequence[str]) -> int:
    class_words = list(words[1:])  # the word with id 0 is the padding
    if word in class_words:
        return class_words.index(word) + 1
    matches = get_close_matches(word, class_words, n=1)
    hint = f"did you mean {matches[0]!r}? " if matches else ""
    raise UsageError(f"no class {word!r}: {hint}the words are {', '.join(class_words)}")


class _Tokenizer(NamedTuple):
    """A loaded tokenizer.

    Attributes:
        size: its number of ids.
        encode: returns the ids of a text, without special tokens.
        spell: returns the token of an id as text.
    """

    size: int
    encode: Callable[[str], list[int]]
    spell: Callable[[int], str | None]


def _load(path: Path, vocab: int) -> Callable[[str], list[int]]:
    """Load a tokenizer file of either kind, check that it has LLaMA's special tokens, and return its encoder."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file: --text-tokenizer takes LLaMA's tokenizer.model or tokenizer.json")
    content = path.read_bytes()
    package, open_file = ("tokenizers", _from_json) if content.lstrip()[:1] == b"{" else ("sentencepiece", _from_model)
    try:
        tokenizer = open_file(content)
    except ModuleNotFoundError:
        raise EngineError(f"reading {path} needs {package}: pip install 'nbp-export[text]'") from None
    except Exception as error:  # the exceptions of both packages have no common base class except Exception
        raise UsageError(f"{path} is neither a SentencePiece model nor a tokenizer.json: {error}") from error
    if tokenizer.size > vocab:
        raise UsageError(
            f"{path} has {tokenizer.size} ids, but the model only {vocab}: it was trained with another tokenizer"
        )
    for token, spelling in SPELLINGS.items():
        if token >= tokenizer.size or tokenizer.spell(token) != spelling:
            raise UsageError(f"{path} is not LLaMA's tokenizer: its id {token} is not {spelling}")
    return tokenizer.encode


def _from_model(content: bytes) -> _Tokenizer:
    from sentencepiece import SentencePieceProcessor

    if not content:
        raise ValueError("it is empty")
    model = SentencePieceProcessor(model_proto=content)
    return _Tokenizer(model.vocab_size(), lambda text: list(model.encode(text)), model.id_to_piece)


def _from_json(content: bytes) -> _Tokenizer:
    from tokenizers import Tokenizer

    model = Tokenizer.from_str(content.decode())
    # The file may contain settings for truncation and padding, which `class_ids` does itself.
    model.no_truncation()
    model.no_padding()
    return _Tokenizer(
        model.get_vocab_size(),
        # Depending on the file, special tokens would include begin-of-text, which `class_ids` adds itself.
        lambda text: list(model.encode(text, add_special_tokens=False).ids),
        model.id_to_token,
    )
