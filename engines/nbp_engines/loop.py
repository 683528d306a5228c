"""The section `loop` of a manifest: the generation loop as data, for implementations in other languages.

Everything in it follows from the spec. `docs/bundle.md` explains the loop in prose, and `generator.py` implements it.
"""

from typing import Any

from nbp_engines.spec import SystemSpec

BLOCK_ORDER = (
    "entry i is the raster index of token i in block order; blocks follow each other by frames, then rows, then "
    "columns of blocks, and the tokens inside a block by frames, then rows, then columns"
)
NOISE = {
    "generator": "Philox4x64-10",
    "key": ["seed", "sample of the clip"],
    "counter": ["1 + floor(position / 4)", "number of the block", 0, 0],
    "word": "position mod 4",
    "uniform": "(word >> 11) * 2^-53",
    "position": "of the token in its block, from 0",
    "number_of_the_block": "among the predicted blocks, from 0",
}
SAMPLING = {
    "arithmetic": "fp64",
    "order": "vocabulary",
    "rule": "top-k, then top-p renormalised, then the inverse of the cumulative distribution",
    "top_k": "keeps the k largest logits and all that equal the k-th",
    "top_p": "keeps the most likely while the sum before them is below p, among equals lower ids first",
    "draw": "the first token whose cumulative sum exceeds min(uniform * total, the fp64 number before total)",
    "temperature_0": "the first of the largest logits",
}


def loop_of(spec: SystemSpec) -> dict[str, Any]:
    """Return the section `loop`: counts, block order, ids, calls of the graphs, noise and sampling.

    Its lists are as long as a clip has tokens, so the caller has to check first that the clip has a reasonable size.
    """
    L, hybrid = spec.block_size, spec.hybrid
    return {
        "mode": "class-conditional" if hybrid else "frame prediction",
        "counts": {
            "batch": spec.batch,
            "condition_tokens": spec.condition_tokens,
            "clip_tokens": spec.clip_tokens,
            "block_size": L,
            "blocks": spec.blocks,
            "steps": spec.steps,
            "capacity": spec.capacity,
        },
        "block_order": {"rule": BLOCK_ORDER, "raster_index": spec.block_order().tolist()},
        "condition": {
            "tokens": "text ids" if hybrid else "video codes of the given frames, in block order",
            "ids": spec.text_vocab if hybrid else spec.vocab,
            "shift": L if hybrid else 0,
        },
        "special_ids": {"begin_of_video": 0, "middle_of_video": [*range(1, L)]} if hybrid else None,
        "video_codes": {
            "shift": spec.code_shift,
            "count": spec.vocab - spec.code_shift,
            "rule": "code = min(max(id - shift, 0), count - 1)",
        },
        "calls": _calls(spec),
        "noise": NOISE,
        "sampling": SAMPLING,
    }


def _calls(spec: SystemSpec) -> list[dict[str, Any]]:
    """Return the calls of the graphs in their order, with equal calls in succession as one entry.

    The n-th call of an entry, counted from 0, has cache_pos = `cache_pos` + n · `cache_pos_increment`.
    """
    P, L, last_block = spec.condition_tokens, spec.block_size, "the block that was drawn last"

    def entry(graph: str, times: int, cache_pos: int, increment: int, tokens: str, logits: str) -> dict[str, Any]:
        return {
            "graph": graph,
            "times": times,
            "cache_pos": cache_pos,
            "cache_pos_increment": increment,
            "tokens": tokens,
            "logits": logits,
        }

    if not spec.hybrid:
        return [
            entry("prefill", 1, 0, 0, "the condition", "of block 0"),
            entry("step", spec.blocks - 1, P, L, last_block, "of the next block"),
        ]
    token_inputs = "first begin-of-video, then the token that was drawn last"
    block_inputs = (
        "first the last token of block 0 and the middle-of-video ids, " if L > 1 else "first block 0, "
    ) + f"then {last_block}"
    return [
        entry("prefill", 1, 0, 0, "the condition with its shift added", "unused"),
        entry("step_1" if L > 1 else "step", L, P, 1, token_inputs, "of the next token of block 0"),
        entry("step", spec.blocks - 1, P + L, L, block_inputs, "of the next block"),
    ]
