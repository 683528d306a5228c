"""Compares the sampling kernel, which runs here on a CPU, with the implementation in numpy.

Both compute in fp64. Their sums differ only in the last digits, because they add in another order and use the exp of
another library. Tokens must be identical unless a sum equals top-p or the noise to within CLOSE; such rows are not
compared.
"""

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import settings as budget
from hypothesis import strategies as st

import nbp_engines
from nbp_engines.sampling import GREEDY, Sampling, draw, nucleus, sample

SOURCE = Path(nbp_engines.__file__).with_name("sample.cu")
CPU = Path(__file__).with_name("cuda_on_cpu.cpp")
LAST = 1 - 2**-53  # the largest uniform that Philox's 53 bits can give
CLOSE = 1e-9
FOLDER = tempfile.TemporaryDirectory()
FORMATS = ["fp32", "fp16", "bf16"]

PLAIN = ["-O2", "-Werror"]
RACES = ["-O1", "-g", "-fsanitize=thread"]
BOUNDS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

# Whole numbers make ties common. The list also has both zeros, and -inf, which is never drawn.
logit_lists = st.lists(st.sampled_from([*map(float, range(-6, 7)), -0.0, 0.5, -np.inf]), min_size=1, max_size=70)
settings = st.builds(
    Sampling,
    st.sampled_from([0.5, 0.83, 1.0, 2.0]),
    st.integers(1, 80),
    st.sampled_from([0.0512, 0.3331, 0.7713, 0.9127, 1.0]),
)


@functools.cache
def compiled(threads: int, options: tuple[str, ...], source: Path = SOURCE) -> Path:
    """Compile the kernel to a program with this number of threads per block, and return its path."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    program = Path(tempfile.mkdtemp(dir=FOLDER.name)) / "kernel"
    defines = [f"-DSAMPLE_THREADS={threads}", f'-DSOURCE="{source}"']
    strict = ["-std=c++20", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off", "-pthread"]
    subprocess.run(["g++", *strict, *options, *defines, CPU, "-o", program], check=True)
    return program


def in_format(logits: np.ndarray, name: str) -> np.ndarray:
    """Return the logits rounded to a format, as float16 or as float32, which holds every bf16 number exactly."""
    rounded: np.ndarray = logits.astype(np.float16 if name == "fp16" else np.float32)
    if name == "bf16":
        rounded = (rounded.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return rounded


def by_kernel(
    logits: np.ndarray,
    uniforms: np.ndarray,
    sampling: Sampling,
    name: str,
    threads: int = 4,
    options: list[str] = PLAIN,
    source: Path = SOURCE,
) -> np.ndarray:
    """Return the kernel's tokens for logits [rows, V] from `in_format`."""
    memory = (logits.view(np.uint32) >> 16).astype(np.uint16) if name == "bf16" else logits
    command = [compiled(threads, tuple(options), source), f"sample_{name}", *logits.shape]
    command += [repr(sampling.temperature), sampling.top_k, repr(sampling.top_p)]
    noise = uniforms.astype(np.float64)
    done = subprocess.run(
        [str(word) for word in command], input=memory.tobytes() + noise.tobytes(), capture_output=True, timeout=300
    )
    if b"unexpected memory mapping" in done.stderr:
        pytest.skip("g++'s thread sanitizer is too old for this system's address layout")
    assert not done.returncode, done.stderr.decode()
    return np.frombuffer(done.stdout, np.int64)


def clear(logits: np.ndarray, uniforms: np.ndarray, sampling: Sampling) -> np.ndarray:
    """Return for each row whether its token is certain, whatever the last digits of the sums are."""
    if sampling.temperature == 0:
        return np.ones(len(logits), bool)
    unlimited = Sampling(sampling.temperature, sampling.top_k, 1.0)
    object.__setattr__(unlimited, "top_p", 2.0)  # this is out of range, so that top-p drops nothing even with rounding
    probs = nucleus(logits, unlimited)
    ranked = -np.sort(-probs, axis=-1)
    before = ranked.cumsum(-1) - ranked
    apart = (abs(before - sampling.top_p) > CLOSE) | (sampling.top_p == 1)
    if sampling.top_p < 1:
        probs = nucleus(logits, sampling)
    cdf = probs.cumsum(-1) / probs.sum(-1, keepdims=True)
    at_an_end = np.isin(uniforms, [0.0, LAST])[:, None]
    # For the smallest and the largest uniform the first and the last token count, unless they are too small for a sum.
    apart &= np.where(at_an_end, probs > CLOSE, abs(cdf - uniforms[:, None]) > CLOSE) | (probs == 0)
    return np.asarray(apart.all(-1))


def check(logits: np.ndarray, uniforms: np.ndarray, sampling: Sampling, name: str, threads: int = 4) -> int:
    """Compare the tokens of all rows whose token is certain, and return the number of these rows."""
    logits = in_format(logits, name)
    certain = clear(logits, uniforms, sampling)
    tokens = by_kernel(logits, uniforms, sampling, name, threads)
    assert tokens[certain].tolist() == sample(logits, uniforms, sampling)[certain].tolist()
    return int(certain.sum())


@pytest.mark.parametrize("name", FORMATS)
@given(logit_lists, settings)
@budget(deadline=None)
def test_small_cases_agree_ties_at_the_edges_included(name: str, logits: list[float], settings: Sampling) -> None:
    assume(max(logits) > -np.inf)
    uniforms = np.array([0.0, 0.0137, 0.2011, 0.4973, 0.7531, 0.9877, LAST])
    check(np.tile(np.array(logits), (len(uniforms), 1)), uniforms, settings, name)


@pytest.mark.parametrize("name", FORMATS)
@given(st.integers(0, 2**32), st.integers(1, 1500), st.floats(0.01, 30), st.integers(1, 2000), st.floats(0.01, 1.0))
@budget(deadline=None, max_examples=50)
def test_random_rows_agree(name: str, seed: int, vocab: int, spread: float, top_k: int, top_p: float) -> None:
    """The rows range from flat ones to rows with a single peak."""
    rng = np.random.default_rng(seed)
    uniforms = np.array([0.0, LAST, *rng.uniform(size=4)])
    sampling = Sampling(float(rng.uniform(0.1, 3)), top_k, top_p)
    check(spread * rng.standard_normal((6, vocab)), uniforms, sampling, name)


@pytest.mark.parametrize("threads", [1, 8])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.7, 50, 0.95), Sampling(1.3, 1, 0.45), Sampling(1.0, 100_000, 1.0), GREEDY]
)
@pytest.mark.parametrize(("vocab", "rows"), [(1000, 64), (64_000, 4)])
def test_rows_as_models_give_them_agree(vocab: int, rows: int, sampling: Sampling, name: str, threads: int) -> None:
    rng = np.random.default_rng(vocab)
    # In half precision thousands of the 64,000 logits are equal, so there are ties at both edges.
    logits = 3 * rng.standard_normal((rows, vocab))
    uniforms = np.array([0.0, *rng.uniform(size=rows - 1)])
    assert (
        check(logits, uniforms, sampling, name, threads) >= rows - 1
    )  # the first token may be too small for the uniform 0


def test_the_largest_vocabulary_of_the_authors_agrees() -> None:
    rng = np.random.default_rng(0)
    assert check(2 * rng.standard_normal((2, 96_016)), np.array([0.3, 0.8]), Sampling(), "bf16") == 2


@pytest.mark.parametrize("name", FORMATS)
def test_every_number_of_threads_gives_the_same_tokens(name: str) -> None:
    """This includes rows where the last digits decide, because no sum depends on which thread comes first."""
    rng = np.random.default_rng(1)
    logits = in_format(rng.integers(-3, 4, (64, 900)).astype(float), name)
    uniforms, sampling = np.arange(64) / 64, Sampling(1.0, 600, 0.9)
    one, few, many = (by_kernel(logits, uniforms, sampling, name, threads) for threads in (1, 4, 96))
    assert one.tolist() == few.tolist() == many.tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_the_lowest_ids_of_ties_are_kept(name: str) -> None:
    logits = in_format(np.tile(np.log([0.1, 0.2, 0.2, 0.2, 0.3]), (200, 1)), name)
    drawn = by_kernel(logits, np.linspace(0, LAST, 200), Sampling(top_p=0.6), name)
    assert sorted(set(drawn.tolist())) == [1, 2, 4]
    drawn = by_kernel(logits, np.linspace(0, LAST, 200), Sampling(top_k=2, top_p=1.0), name)
    assert sorted(set(drawn.tolist())) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sampling", [Sampling(1.0, 3, 0.9), Sampling(1e5, 6, 1.0), GREEDY])
def test_nan_and_infinity_give_the_same_tokens_as_in_numpy(sampling: Sampling, name: str) -> None:
    special = [np.nan, -np.nan, np.inf, -np.inf]
    rows = [[5.0, 1.0, value, 2.0, other, 2.0] for value in special for other in [*special, 0.0]] + [[-np.inf] * 6]
    logits = in_format(np.array(rows), name)
    uniforms = np.full(len(rows), 0.45)
    with np.errstate(invalid="ignore"):
        expected = sample(logits, uniforms, sampling)
    assert by_kernel(logits, uniforms, sampling, name).tolist() == expected.tolist()


@pytest.mark.parametrize("name", FORMATS)
def test_every_finite_value_is_read_exactly(name: str) -> None:
    """This includes subnormals. In a row [x, 0] at temperature |x| the second token has probability 1/(1 + e^±1)."""
    sizes = {"fp32": [1e-45, 1e-40, 2**-126], "fp16": [2**-24, 5e-5, 65504], "bf16": [9.2e-41, 2**-126, 1e38]}
    for size in [*sizes[name], 1.0, 0.75, 300.0]:
        for sign in (1, -1):
            logits = np.array([[sign * size, 0.0]])
            exact = abs(float(in_format(logits, name)[0, 0]))
            uniforms = np.linspace(0.01, 0.99, 50)
            assert check(np.tile(logits, (50, 1)), uniforms, Sampling(exact, 2, 1.0), name) == 50


@pytest.mark.parametrize("uniform", [LAST, 1.0])
@pytest.mark.parametrize("sampling", [Sampling(1.0, 20, 0.95), Sampling(1.0, 37, 1.0)])
def test_a_draw_never_leaves_the_kept_tokens(sampling: Sampling, uniform: float) -> None:
    """The last logit is so small that it does not change the sum."""
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((100, 37)).astype(np.float32)
    logits[:, -1] = -200.0
    expected = draw(nucleus(logits, sampling), np.full(100, uniform))
    assert by_kernel(logits, np.full(100, uniform), sampling, "fp32").tolist() == expected.tolist()


@pytest.mark.parametrize("options", [RACES, BOUNDS], ids=["races", "bounds"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("sampling", [Sampling(1.0, 60, 0.9), GREEDY])
def test_sanitizers_find_nothing(sampling: Sampling, name: str, options: list[str]) -> None:
    rng = np.random.default_rng(2)
    logits = in_format(rng.integers(-9, 9, (4, 333)) / 2, name)
    uniforms = rng.uniform(size=4)
    tokens = by_kernel(logits, uniforms, sampling, name, 8, options)
    assert tokens.tolist() == by_kernel(logits, uniforms, sampling, name).tolist()


BROKEN = {
    "ended": ("unsigned best = largest();", "unsigned best = largest(); if (threadIdx.x == 1) return 0;"),
    "another barrier": ("            fill(shift", "            if (threadIdx.x) __syncthreads(); fill(shift"),
    "data race": (
        "atomicMax(&scratch.largest, thread_largest);",
        "scratch.largest = max(scratch.largest, thread_largest);",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_between_threads_is_noticed(fault: str, tmp_path: Path) -> None:
    """The other tests rely on the emulation of threads noticing such faults."""
    right, wrong = BROKEN[fault]
    text = SOURCE.read_text()
    assert text.count(right) == 1
    broken = tmp_path / "broken.cu"
    broken.write_text(text.replace(right, wrong))
    with pytest.raises(AssertionError, match="barrier at line" if fault != "data race" else "data race"):
        by_kernel(np.ones((2, 50), np.float32), np.zeros(2), Sampling(1.0, 9, 0.9), "fp32", 8, RACES, broken)
