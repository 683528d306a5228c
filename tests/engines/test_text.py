"""Class names as text ids, with a bundle's own words and with both kinds of file of LLaMA's tokenizer."""

import io
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import AddedToken, Tokenizer, models, normalizers, processors

from nbp_engines.errors import EngineError
from nbp_engines.spec import SystemSpec
from nbp_engines.text import class_ids, listed_ids
from nbp_errors import UsageError

WORDS = ("<end>", "moving", "digit", "left", "right")
CLASSES = ("apply eye makeup", "yo yo", "tai chi", "body weight squats", "playing guitar")


def spec_of(vocab: int = 32_000, tokens: int = 8) -> SystemSpec:
    return SystemSpec(
        block=(1, 1, 4),
        latent=(5, 4, 4),
        condition_latents=0,
        video=(17, 16, 16),
        condition_frames=0,
        batch=1,
        dtype="fp32",
        layers=1,
        heads=1,
        head_dim=8,
        vocab=264,
        text_tokens=tokens,
        text_vocab=vocab,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece model with LLaMA's special tokens and a few dozen pieces."""
    trained = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(CLASSES * 5),
        model_writer=trained,
        model_type="bpe",
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("text") / "tokenizer.model"
    path.write_bytes(trained.getvalue())
    return path


def as_json(model: Path, path: Path, template: bool) -> Path:
    """Write the same tokenizer as a tokenizer.json, with or without a template that adds begin-of-text."""
    pieces = SentencePieceProcessor(model_file=str(model))
    spellings = [pieces.id_to_piece(i) for i in range(pieces.vocab_size())]
    ranked = {piece: i for i, piece in enumerate(spellings)}
    merges = [
        (left, right)
        for piece in spellings[3:]
        for left, right in ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        if left in ranked and right in ranked
    ]
    tokenizer = Tokenizer(models.BPE(ranked, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    if template:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(pad_id=0, length=20)
    tokenizer.save(str(path))
    return path


def ids(
    name: str, tokenizer: Path | None = None, words: Sequence[str] = (), spec: SystemSpec | None = None
) -> list[int]:
    text = class_ids(name, spec or spec_of(), words, tokenizer)
    assert text.dtype == np.int64
    return [int(i) for i in text]


@pytest.mark.parametrize("name", ["YoYo", "TaiChi", "ApplyEyeMakeup", "BodyWeightSquats"])
@pytest.mark.parametrize("template", [True, False])
def test_both_kinds_of_file_give_what_the_authors_gave(name: str, template: bool, model: Path, tmp_path: Path) -> None:
    by_model = ids(name, model)
    assert ids(name, as_json(model, tmp_path / "anything", template)) == by_model
    text = {"YoYo": "yo yo", "TaiChi": "tai chi", "ApplyEyeMakeup": "apply eye makeup"}.get(name, "body weight squats")
    pieces = SentencePieceProcessor(model_file=str(model)).encode(text)
    assert by_model == [1, *pieces, 2, 2, 2, 2, 2, 2, 2][:8]
    assert by_model.count(1) == 1
    assert 0 not in by_model


def test_a_long_name_is_cut_and_a_short_one_filled(model: Path) -> None:
    long = ids("ApplyEyeMakeupPlayingGuitarTaiChi", model)
    assert len(long) == 8
    assert long[0] == 1
    assert 2 not in long
    assert ids("Yo", model)[-4:] == [2, 2, 2, 2]


@pytest.mark.parametrize("name", ["ApplyEyeMakeup", "apply eye makeup", " Apply  eyeMakeup "])
def test_names_are_split_at_capitals_and_lowered(name: str, model: Path) -> None:
    assert ids(name, model) == ids("ApplyEyeMakeup", model)


def test_own_words_are_looked_up_and_filled_with_the_end() -> None:
    assert ids("MovingDigitLeft", words=WORDS) == [1, 2, 3, 0, 0, 0, 0, 0]
    assert ids("digit " * 9, words=WORDS) == [2] * 8


@given(st.lists(st.sampled_from(WORDS[1:]), min_size=1, max_size=8))
def test_own_words_in_any_order_read_back(chosen: list[str]) -> None:
    found = ids("".join(word.title() for word in chosen), words=WORDS)
    assert [WORDS[i] for i in found] == [*chosen, *["<end>"] * (8 - len(chosen))]


def test_the_error_about_an_unknown_word_lists_the_words() -> None:
    with pytest.raises(
        UsageError, match=r"no class 'digits': did you mean 'digit'\? the words are moving, digit, left"
    ):
        ids("MovingDigits", words=WORDS)
    with pytest.raises(UsageError, match=r"no class 'xylophone': the words are moving"):
        ids("Xylophone", words=WORDS)
    with pytest.raises(UsageError, match="no class '<end>'"):
        ids("<end>", words=WORDS)


def test_a_name_without_words() -> None:
    with pytest.raises(UsageError, match="class ' ' has no words"):
        ids(" ", words=WORDS)


def test_a_tokenizer_where_none_is_needed_or_none_where_one_is(model: Path) -> None:
    with pytest.raises(UsageError, match="leave out"):
        ids("left", model, WORDS)
    with pytest.raises(UsageError, match=r"--text-tokenizer FILE, or 8 ids as --text-ids"):
        ids("YoYo")


@pytest.mark.parametrize("kind", ["model", "json"])
def test_a_tokenizer_with_more_ids_than_the_model(kind: str, model: Path, tmp_path: Path) -> None:
    size = SentencePieceProcessor(model_file=str(model)).vocab_size()
    file = model if kind == "model" else as_json(model, tmp_path / "tokenizer.json", True)
    assert ids("YoYo", file, spec=spec_of(size))[0] == 1
    with pytest.raises(UsageError, match=f"has {size} ids, but the model only {size - 1}"):
        ids("YoYo", file, spec=spec_of(size - 1))


def test_a_tokenizer_of_another_layout(tmp_path: Path) -> None:
    tokenizer = Tokenizer(models.BPE({"<pad>": 0, "a": 1, "b": 2}, []))
    tokenizer.save(str(tmp_path / "other.json"))
    with pytest.raises(UsageError, match=r"other\.json is not LLaMA's tokenizer: its id 1 is not <s>"):
        ids("YoYo", tmp_path / "other.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"{", b"\xff\xfe", b"junk" * 99, b'{"model": {"type": "BPE"}}'])
def test_a_file_that_is_no_tokenizer(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"file is neither a SentencePiece model nor a tokenizer\.json"):
        ids("YoYo", path)
    with pytest.raises(UsageError, match="nowhere is not a file"):
        ids("YoYo", tmp_path / "nowhere")


@pytest.mark.parametrize(("package", "content"), [("sentencepiece", b"model"), ("tokenizers", b" {}")])
def test_a_missing_package_is_one_line(
    package: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(content)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EngineError, match=rf"file needs {package}: pip install 'nbp-export\[text\]'"):
        ids("YoYo", tmp_path / "file")


def test_listed_ids() -> None:
    assert listed_ids("5, 0,31999,0,0,0,0,1", spec_of()).tolist() == [5, 0, 31999, 0, 0, 0, 0, 1]
    with pytest.raises(UsageError, match="2 text ids in 5,0, but the model takes exactly 8"):
        listed_ids("5,0", spec_of())
    for wrong in ("32000", "-1", "x", "", "9" * 40):
        with pytest.raises(UsageError, match=f"'{wrong}' is not a text id: give whole numbers from 0 to 31999"):
            listed_ids(f"{wrong},0,0,0,0,0,0,0", spec_of())


def test_no_torch_is_imported(model: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nbp_engines.text import _load\n"
        f"_load(Path({str(model)!r}), 32000)('yo yo'); assert 'torch' not in sys.modules"
    )
    path = str(Path(__file__).parents[2] / "engines")
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=True)
