"""Generates clips of a bundle, written from docs/bundle.md alone, with numpy and ONNX Runtime and none of our packages.

`python by_the_book.py BUNDLE` checks this program against the bundle's trace.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

Json = dict[str, Any]
DTYPES: dict[str, type] = {"fp32": np.float32, "fp16": np.float16, "int64": np.int64}
TOLERANCE = {"fp32": 5e-5, "fp16": 1e-2}
WORD = 2**64


class Bundle:
    """The generator's graphs, bound to one buffer per state."""

    def __init__(self, folder: Path) -> None:
        self.manifest: Json = json.loads((folder / "manifest.json").read_text())
        assert self.manifest["schema"] == 4
        self.buffers: dict[str, np.ndarray] = {}
        self.graphs: dict[str, tuple[Any, Any, dict[str, np.ndarray]]] = {}
        for name in dict.fromkeys(call["graph"] for call in self.manifest["loop"]["calls"]):
            options = ort.SessionOptions()
            options.intra_op_num_threads = 1
            file = str(folder / self.manifest["graphs"][name])
            session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            self.graphs[name] = (session, *self.bound(session, self.manifest["signatures"][name]))

    def bound(self, session: Any, signature: Json) -> tuple[Any, dict[str, np.ndarray]]:
        binding, tensors = session.io_binding(), {}
        sources = {state["output"]: state["input"] for state in signature["states"] if state["in_place"]}
        states = {state["input"] for state in signature["states"]}
        for kind in ("inputs", "outputs"):
            for tensor in signature[kind]:
                name, dtype, shape = tensor["name"], DTYPES[tensor["dtype"]], tensor["shape"]
                source = sources.get(name, name)
                if source in states:
                    memory = self.buffers.setdefault(source, np.zeros(shape, dtype))
                else:
                    memory = np.zeros(shape, dtype)
                tensors[name] = memory
                bind = binding.bind_input if kind == "inputs" else binding.bind_output
                bind(name, "cpu", 0, dtype, shape, memory.ctypes.data)
        return binding, tensors

    def run(self, graph: str, tokens: np.ndarray, position: int) -> np.ndarray:
        session, binding, tensors = self.graphs[graph]
        tensors["tokens"][:] = tokens
        tensors["cache_pos"][:] = position
        session.run_with_iobinding(binding)
        logits: np.ndarray = tensors["logits"].copy()
        return logits


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    for number in range(10):
        if number > 0:
            key = ((key[0] + 0x9E3779B97F4A7C15) % WORD, (key[1] + 0xBB67AE8584CAA73B) % WORD)
        a, c = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = (c // WORD ^ counter[1] ^ key[0], c % WORD, a // WORD ^ counter[3] ^ key[1], a % WORD)
    return counter


def noise(seed: int, sample: int, batch: int, block: int, positions: range) -> np.ndarray:
    def uniform(clip: int, p: int) -> float:
        return (philox((1 + p // 4, block, 0, 0), (seed, sample + clip))[p % 4] >> 11) * 2.0**-53

    return np.array([[uniform(clip, p) for p in positions] for clip in range(batch)])


def draw_token(logits: np.ndarray, u: float, sampling: Json) -> int:
    if sampling["temperature"] == 0:
        return int(np.flatnonzero(logits == logits.max())[0])
    s = logits.astype(np.float64) / sampling["temperature"]
    p = np.exp(s - s.max())
    if s.size > sampling["top_k"]:
        p[s < np.sort(s)[-sampling["top_k"]]] = 0
    p /= p.sum()
    r = np.sort(p)[::-1]
    n = int((np.cumsum(r) - r < sampling["top_p"]).sum())
    equal = np.flatnonzero(p == r[n - 1])
    p[equal[n - (p > r[n - 1]).sum() :]] = 0
    p[p < r[n - 1]] = 0
    cdf = np.cumsum(p)
    target = min(u * cdf[-1], np.nextafter(cdf[-1], 0))
    return int(np.flatnonzero(cdf > target)[0])


def draw(logits: np.ndarray, uniforms: np.ndarray, sampling: Json) -> np.ndarray:
    rows = [
        [draw_token(*row, sampling) for row in zip(*clip, strict=True)] for clip in zip(logits, uniforms, strict=True)
    ]
    return np.array(rows, np.int64)


def calls(
    bundle: Bundle, condition: np.ndarray, seed: int, sample: int, sampling: Json, clip: np.ndarray
) -> Iterator[Json]:
    """Yield each call of the loop, with the fields that a call of the trace has.

    The loop continues with the tokens in `drawn`, which the caller may replace. It writes the tokens to `clip`
    [B,T·H·W] in raster order.
    """
    loop = bundle.manifest["loop"]
    counts, order = loop["counts"], loop["block_order"]["raster_index"]
    P, L, batch, blocks = (counts[name] for name in ("condition_tokens", "block_size", "batch", "blocks"))

    def call(graph: str, tokens: np.ndarray, position: int, block: int | None, positions: range) -> Json:
        result: Json = {"graph": graph, "tokens": tokens, "cache_pos": np.full(batch, position)}
        result["logits"] = bundle.run(graph, tokens, position)
        if block is not None:
            result["uniforms"] = noise(seed, sample, batch, block, positions)
            result["drawn"] = draw(result["logits"], result["uniforms"], sampling)
        return result

    if loop["mode"] == "frame prediction":
        clip[:, :P] = condition
        result = call("prefill", clip[:, order[:P]], 0, 0, range(L))
        for k in range(blocks):
            yield result
            block = result["drawn"]
            clip[:, order[P + k * L : P + k * L + L]] = block
            if k < blocks - 1:
                result = call("step", block, P + k * L, k + 1, range(L))
        return
    yield call("prefill", condition + L, 0, None, range(0))
    token = np.zeros((batch, 1), np.int64)
    for i in range(L):
        result = call("step_1" if L > 1 else "step", token, P + i, 0, range(i, i + 1))
        yield result
        token = result["drawn"]
        clip[:, order[i : i + 1]] = token
    tokens = np.concatenate([token, np.tile(np.arange(1, L), (batch, 1))], axis=1)
    for k in range(1, blocks):
        result = call("step", tokens, P + k * L, k, range(L))
        yield result
        tokens = result["drawn"]
        clip[:, order[k * L : k * L + L]] = tokens


def generate(folder: Path, condition: np.ndarray, seed: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the token ids of a clip and their video codes, both [B,T·H·W] in raster order."""
    bundle = Bundle(folder)
    loop = bundle.manifest["loop"]
    clip = np.zeros((loop["counts"]["batch"], loop["counts"]["clip_tokens"]), np.int64)
    for _ in calls(bundle, condition, seed, sample, bundle.manifest["sampling"], clip):
        pass
    codes = loop["video_codes"]
    return clip, np.minimum(np.maximum(clip - codes["shift"], 0), codes["count"] - 1)


def differences(folder: Path) -> list[str]:
    """Return a line for each difference between this program and the bundle's trace."""
    bundle, trace = Bundle(folder), json.loads((folder / "trace.json").read_text())
    counts, lines = bundle.manifest["loop"]["counts"], []
    tolerance = TOLERANCE[bundle.manifest["spec"]["dtype"]]
    actual = calls(
        bundle,
        np.array(trace["condition"]),
        trace["seed"],
        trace["sample"],
        trace["sampling"],
        np.zeros((counts["batch"], counts["clip_tokens"]), np.int64),
    )
    for number, (expected, call) in enumerate(zip(trace["calls"], actual, strict=False)):
        for name in ("graph", "tokens", "cache_pos", "uniforms", "drawn"):
            if expected[name] != (call[name] if name == "graph" else np.asarray(call.get(name)).tolist()):
                lines.append(f"call {number}: {name} differ")
        for row in expected["logits"]:
            values = call["logits"][row["clip"], row["row"], trace["vocabulary_ids"]].astype(np.float64)
            if np.abs(values - row["values"]).max() > tolerance * max(1, expected["largest"]):
                lines.append(f"call {number}: logits of clip {row['clip']}, row {row['row']} differ")
        if abs(np.abs(call["logits"]).max() - expected["largest"]) > tolerance * max(1, expected["largest"]):
            lines.append(f"call {number}: largest differs")
        if expected["drawn"] is not None:
            call["drawn"] = np.array(expected["drawn"])
    return lines


if __name__ == "__main__":
    sys.exit("\n".join(differences(Path(sys.argv[1]))))
