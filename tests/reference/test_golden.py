"""The reference reproduces recorded outputs of the authors' implementation."""

import pytest
import torch
from torch import Tensor

from nbp_reference.config import TOKENIZERS
from nbp_reference.model import tensor_scatter_
from nbp_reference.tokenizer import VideoTokenizer
from tests.support import filled, golden, golden_generator, golden_hybrid

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
def test_hybrid_continues_its_text_greedily() -> None:
    case, model = golden("ucf_L4"), golden_hybrid()
    config, L = model.config, model.L
    assert config.vocab == case["V"].item()
    k, v = model.empty_caches()

    def logits(tokens: Tensor, position: int) -> Tensor:
        return model.block_step(tokens, torch.tensor([position]), k, v, write=tensor_scatter_)[0]

    text = case["text"].long()
    logits(text + L, 0)
    position, steps, tokens, found = text.shape[1], 0, torch.tensor([[0]]), torch.empty(1, 0, dtype=torch.long)
    while found.shape[1] < config.clip_tokens:
        if found.shape[1] == L and position == text.shape[1] + L:
            tokens = torch.cat([found[:, -1:], torch.arange(1, L)[None]], 1)
        predicted = logits(tokens, position).argmax(-1)
        position, steps = position + tokens.shape[1], steps + 1
        tokens, found = predicted, torch.cat([found, predicted], 1)
    assert torch.equal(found, case["greedy"].long())
    assert steps == case["steps"].item()


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
