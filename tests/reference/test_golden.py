"""The authors' implementation, by its recorded inputs and outputs."""

import pytest
import torch

from nbp_reference.config import TOKENIZERS
from nbp_reference.model import tensor_scatter_
from nbp_reference.tokenizer import VideoTokenizer
from tests.support import filled, golden, golden_generator

TOLERANCE = 1e-4


@pytest.mark.parametrize("block", ["1", "16"])
@torch.inference_mode()
def test_full_forward(block: str) -> None:
    case, model = golden(f"k600_L{block}"), golden_generator(block)
    logits = model(case["tokens"][:, : -model.L].long())
    torch.testing.assert_close(
        logits[0, case["teacher_forced_rows"]], case["teacher_forced_logits"], atol=TOLERANCE, rtol=0
    )


@pytest.mark.parametrize("block", ["1", "16"])
@torch.inference_mode()
def test_prefill_and_cached_steps_continue_greedily(block: str) -> None:
    case, model = golden(f"k600_L{block}"), golden_generator(block)
    config = model.config
    k, v = model.empty_caches()
    tokens, position, blocks = case["tokens"][:, : config.condition_tokens].long(), 0, []
    while True:
        logits, k, v = model.block_step(tokens, torch.tensor([position]), k, v, write=tensor_scatter_)
        if position == 0:
            torch.testing.assert_close(logits[0], case["prefill_last_logits"], atol=TOLERANCE, rtol=0)
        position += tokens.shape[1]
        tokens = logits.argmax(-1)
        blocks.append(tokens)
        if position == config.capacity:
            break
    torch.testing.assert_close(torch.cat(blocks, 1), case["greedy"].long())


@torch.inference_mode()
def test_tokenizer() -> None:
    case = golden("tokenizer")
    with torch.device("meta"):
        model = VideoTokenizer(TOKENIZERS["official"])
    model = filled(model)
    latents = model.latents(case["video"])
    torch.testing.assert_close(latents.permute(0, 4, 1, 2, 3), case["latent"], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model.encode(case["video"]), case["indices"].flatten(1).long())
    for indices, video in (("indices", "reconstruction"), ("random_indices", "random_reconstruction")):
        codes = model.fsq.codes(case[indices].long())
        torch.testing.assert_close(model.reconstruct(codes), case[video], atol=TOLERANCE, rtol=0)
