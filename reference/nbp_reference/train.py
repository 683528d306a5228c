"""Trains nbp-tiny on the train parts of the clips: `python -m nbp_reference.train --help`.

Every batch depends only on the seed and the training step, so an interrupted run ends with the weights of an
uninterrupted one. Shape legend: B batch, F frames, T latent frames, P text tokens, H×W pixels, h×w tokens.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nbp_errors import printable
from nbp_reference import checkpoint, clips
from nbp_reference.config import MODELS, TOKENIZERS, ModelConfig
from nbp_reference.model import NextBlockTransformer, training_pair
from nbp_reference.tokenizer import CausalConv3d, DepthToSpace, FrameGroupNorm, ResidualUnit, VideoTokenizer

SIDE = 128  # pixels
FRAMES = 17
CROP, CROP_FRAMES = 96, 9  # the tokenizer trains on small crops, because it is causal and convolutional
CHECK_EVERY = 200  # training steps between evaluations


@dataclass(frozen=True)
class Schedule:
    """The settings of AdamW, and a learning rate with a linear warm-up and a cosine decay to zero.

    Attributes:
        steps: the number of training steps.
        rate: the highest learning rate.
        warmup: the number of steps of the warm-up.
        decay: the weight decay of matrices.
    """

    steps: int
    rate: float
    warmup: int = 50
    decay: float = 0.05

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a training step."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


@cache
def split_clips() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the train parts and the held-out parts of all clips, uint8 [F,3,H,W] with a shorter side of 128."""
    train, held_out = zip(*(clips.split(clips.read(clips.find(name), SIDE)) for name in clips.CLIPS), strict=True)
    return list(train), list(held_out)


def to_video(frames: list[np.ndarray]) -> Tensor:
    """Convert windows uint8 [F,3,H,W] to one float batch [B,3,F,H,W] in [0,1]."""
    return torch.from_numpy(np.stack(frames)).transpose(1, 2).float() / 255


def centred_windows(videos: list[np.ndarray], stride: int) -> list[list[np.ndarray]]:
    """Return windows [17,3,128,128] from the centre of each video, one starting at every `stride`-th frame."""
    return [clips.windows(clips.centre(video, SIDE), FRAMES, stride) for video in videos]


def held_out_windows(stride: int = 8) -> list[np.ndarray]:
    """Return windows [17,3,128,128] from the centre of the held-out parts."""
    return list(chain(*centred_windows(split_clips()[1], stride)))


def random_window(videos: list[np.ndarray], rng: np.random.Generator, frames: int, side: int) -> np.ndarray:
    """Return a random window [frames,3,side,side], mirrored with probability 1/2.

    A video is chosen with a probability in proportion to the square root of its number of windows.
    """
    weights = np.sqrt([len(v) - frames + 1 for v in videos])
    video = videos[rng.choice(len(videos), p=weights / weights.sum())]
    f, y, x = (rng.integers(0, n + 1) for n in (len(video) - frames, video.shape[2] - side, video.shape[3] - side))
    window = video[f : f + frames, :, y : y + side, x : x + side]
    return window[..., ::-1] if rng.random() < 0.5 else window


def fit(
    model: nn.Module, loss_of: Callable[[int], Tensor], evaluate: Callable[[], float], schedule: Schedule, run: Path
) -> None:
    """Train `model` in place, continuing from `run`.resume if that exists.

    Args:
        model: the model.
        loss_of: computes the training loss of a step.
        evaluate: computes the held-out metric.
        schedule: the number of steps and the learning rate.
        run: the path of the run's files without their suffix. Every 200 steps, `run`.resume gets the state of the
            training, and `run`.jsonl a line with the step, the mean training loss and the held-out metric.
    """
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": schedule.decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    resume, curve, start = run.with_suffix(".resume"), run.with_suffix(".jsonl"), 0
    if resume.exists():
        saved = torch.load(resume, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
        click.echo(f"{run.name}: resumed at step {start}")
    losses: list[float] = []
    began = time.monotonic()
    for step in range(start, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        done = step + 1
        if done % CHECK_EVERY == 0 or done == schedule.steps:
            with torch.inference_mode():
                held_out = evaluate()
            row = {"step": done, "train": float(np.mean(losses)), "held_out": held_out}
            with curve.open("a") as file:
                file.write(json.dumps(row) + "\n")
            seconds = (time.monotonic() - began) / (done - start)
            click.echo(f"{run.name} {done}/{schedule.steps}  {row}  {seconds:.2f} s per step")
            losses.clear()
            partial = resume.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, partial)
            partial.replace(resume)


def opponent_means(video: Tensor) -> Tensor:
    """Return the mean colour behind each token in opponent axes, [B,T,h,w,3], of a video [B,3,F,H,W] in [0,1].

    The axes are brightness, red minus blue, and green minus the mean of both, scaled to about unit deviation.
    """
    first, rest = F.avg_pool3d(video[:, :, :1], (1, 8, 8)), F.avg_pool3d(video[:, :, 1:], (4, 8, 8))
    r, g, b = torch.cat([first, rest], 2).unbind(1)
    return torch.stack([(r + g + b - 1.35) / 0.75, (r - b) / 0.12, (g - (r + b) / 2) / 0.06], -1)


def block_means(videos: list[np.ndarray]) -> np.ndarray:
    """Return the mean colour behind each token of windows uint8 [17,3,128,128], float64 [tokens,3] in [0,1].

    A token stands for 8×8 pixels of four frames, or of the first frame alone.
    """
    rows = []
    for video in videos:
        small = video.reshape(FRAMES, 3, SIDE // 8, 8, SIDE // 8, 8).mean((3, 5)) / 255
        latent = np.concatenate([small[:1], small[1:].reshape(-1, 4, *small.shape[1:]).mean(1)])
        rows.append(latent.transpose(0, 2, 3, 1).reshape(-1, 3))
    return np.concatenate(rows)


def kmeans_psnr(train: list[np.ndarray], held_out: list[np.ndarray], codes: int) -> float:
    """Return the PSNR in dB of a baseline for the tokenizer with as many bits per token.

    The baseline paints all pixels behind a token with the nearest of `codes` colours, which k-means learns from the
    mean colours of the train windows.
    """
    from scipy.cluster.vq import kmeans2, vq

    centroids, _ = kmeans2(block_means(train), codes, seed=0, minit="++", iter=20)
    colours = centroids[vq(block_means(held_out), centroids)[0]].reshape(len(held_out), -1, SIDE // 8, SIDE // 8, 3)
    frames = np.concatenate([colours[:, :1], colours[:, 1:].repeat(4, 1)], 1).repeat(8, 2).repeat(8, 3)
    truth = np.stack(held_out).transpose(0, 1, 3, 4, 2) / 255
    return float(-10 * np.log10(((frames - truth) ** 2).mean()))


def unigram_entropy(tokens: Tensor) -> float:
    """Return the entropy in nats of the tokens' distribution, the lowest loss of a model without context."""
    share = torch.bincount(tokens.flatten()).double() / tokens.numel()
    return float(torch.special.entr(share).sum())


def encode_all(tokenizer: VideoTokenizer, windows: list[np.ndarray]) -> Tensor:
    """Return the tokens of windows [17,3,128,128], int64 [windows,1280] in raster order."""
    with torch.inference_mode():
        return torch.cat([tokenizer.encode(to_video([w])) for w in windows])


def init_as_linear(model: VideoTokenizer) -> None:
    """Initialise the tokenizer as a linear autoencoder that preserves brightness and upsamples smoothly.

    Residual units start as identities. A convolution before a depth-to-space starts with the same weights for every
    sub-pixel, so that the pair upsamples by repetition. The biases are random: GroupNorm removes each frame's mean and
    deviation, and thereby its brightness, unless some channels are constant and so determine the statistics.
    """
    layers = [*model.encoder_layers.children(), *model.decoder_layers.children()]
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, ResidualUnit):
            last = layer.fn[-1]
            assert isinstance(last, CausalConv3d)
            nn.init.zeros_(last.conv.weight)
        elif isinstance(layer, CausalConv3d):
            copies = prod(following.stride) if isinstance(following, DepthToSpace) else 1
            weight, bias = layer.conv.weight.data, layer.conv.bias
            assert bias is not None
            one = torch.randn(weight.shape[0] // copies, *weight.shape[1:]) / math.sqrt(weight[0].numel())
            weight.copy_(one.repeat(copies, 1, 1, 1, 1))
            bias.data.copy_(torch.randn(len(one)).repeat(copies) if following else torch.full_like(bias, 0.5))


def shrink_to_fp16(model: VideoTokenizer, windows: list[np.ndarray], largest: float = 4096) -> None:
    """Scale the convolution before the decoder's last GroupNorm down by a power of two, in place.

    The norm removes any scale, so the output stays the same. For the same reason, training does not limit the weights
    before the norm: activations grew to 237,000, which is infinite in fp16 and NaN after the norm.

    Args:
        model: the trained tokenizer.
        windows: the windows on which the activations are measured, uint8 [F,3,H,W].
        largest: the largest magnitude that the activations before the norm may have.
    """
    norm = next(i for i, layer in enumerate(model.decoder_layers) if isinstance(layer, FrameGroupNorm))
    before, conv = model.decoder_layers[: norm - 1], model.decoder_layers[norm - 2]
    assert isinstance(conv, CausalConv3d)
    with torch.no_grad():
        codes = (model.fsq.quantize(model.latents(to_video([w]))) for w in windows)
        maximum = max(float(before(c.permute(0, 4, 1, 2, 3)).abs().max()) for c in codes)
        for parameter in conv.parameters():
            parameter.div_(2.0 ** max(0, math.ceil(math.log2(maximum / largest))))


@click.group()
def main() -> None:
    """Train nbp-tiny on seven clips of Python and Debian packages: first its tokenizer, then its generators.

    An interrupted command continues where it stopped if it is run again.
    """


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), help="Folder for weights and losses.")
@click.option("--steps", default=3000, help="Number of training steps.")
@click.option("--seed", default=0, help="Seed of the weights and the crops.")
def tokenizer(out: Path, steps: int, seed: int) -> None:
    """Train the tokenizer by mean squared error on crops of 9×96×96 pixels."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = VideoTokenizer(TOKENIZERS["nbp-tiny"]).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    init_as_linear(model)
    train, _ = split_clips()
    held_out = held_out_windows()

    def reconstruction_error(video: Tensor, latents: Tensor) -> Tensor:
        return F.mse_loss(model.reconstruct(model.fsq.quantize(latents)).float(), video)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        video = to_video([random_window(train, rng, CROP_FRAMES, CROP) for _ in range(2)])
        latents = model.latents(video).float()
        # Otherwise the quantiser would start with a few grey codes and keep them: first pull three channels to colours.
        colour_weight = 0.1 * max(0.0, 1 - step / (0.25 * steps))
        colour_error = F.mse_loss(latents[..., :3], opponent_means(video))
        return reconstruction_error(video, latents) + colour_weight * colour_error

    def psnr(windows: list[np.ndarray]) -> float:
        videos = (to_video([w]) for w in windows)
        return -10 * math.log10(np.mean([reconstruction_error(v, model.latents(v).float()).item() for v in videos]))

    fit(model, loss_of, lambda: psnr(held_out[::5]), Schedule(steps, rate=2e-3), out / "tokenizer")
    shrink_to_fp16(model, held_out[::5])
    checkpoint.save(model, out / "tokenizer.safetensors")
    with torch.inference_mode():
        held_out_psnr = psnr(held_out)
    baseline = kmeans_psnr([clips.centre(v, SIDE)[:FRAMES] for v in train], held_out, model.config.vocab)
    click.echo(f"held-out PSNR {held_out_psnr:.2f} dB; k-means of block means at equal bits {baseline:.2f} dB")


def class_tokens(model: VideoTokenizer, out: Path, config: ModelConfig) -> list[tuple[Tensor, Tensor]]:
    """Return tokens int64 [windows,1280] and text [windows,P], for the train and for the held-out windows.

    The text is the name of each window's clip. Windows are centred and not mirrored, because so small a model can only
    learn a clip that always looks the same. The first call of a run writes the tokens to a file in `out`.
    """
    file = out / "class-tokens.npz"
    assert config.text is not None
    if not file.exists():
        arrays: dict[str, Any] = {}
        for name, videos in zip(("train", "held"), split_clips(), strict=True):
            groups = centred_windows(videos, stride=2)
            ids = [config.text.words.index(clip) for clip in clips.CLIPS]
            arrays[name] = encode_all(model, list(chain(*groups))).numpy().astype(np.int16)
            arrays[f"{name}_class"] = np.repeat(ids, [len(group) for group in groups])
        np.savez_compressed(file, **arrays)
    saved = np.load(file)
    pairs = []
    for name in ("train", "held"):
        text = torch.zeros(len(saved[name]), config.text.tokens, dtype=torch.long)
        text[:, 0] = torch.from_numpy(saved[f"{name}_class"])
        pairs.append((torch.from_numpy(saved[name]).long(), text))
    return pairs


def training_tokens(model: VideoTokenizer, out: Path, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return tokens int64 [windows,1280] of `count` random train windows, and of the held-out windows.

    The first call of a run writes the tokens to a file in `out`.
    """
    file = out / "tokens.npz"
    if not file.exists():
        rng = np.random.default_rng(seed)
        windows = [random_window(split_clips()[0], rng, FRAMES, SIDE) for _ in range(count)]
        train, held_out = encode_all(model, windows), encode_all(model, held_out_windows(stride=4))
        np.savez_compressed(file, train=train.numpy().astype(np.int16), held=held_out.numpy().astype(np.int16))
    saved = np.load(file)
    return torch.from_numpy(saved["train"]).long(), torch.from_numpy(saved["held"]).long()


def batch_rows(rows: int, size: int, seed: int, step: int) -> Tensor:
    """Return the row numbers of a step's batch, int64 [size], which are random in [0, rows)."""
    return torch.from_numpy(np.random.default_rng((seed, step)).integers(0, rows, size))


@main.command()
@click.option("--block", required=True, help="Block shape or size, such as 1x1x16.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    help="Folder for weights and losses, in which the tokenizer lies already.",
)
@click.option("--steps", default=600, help="Number of training steps.")
@click.option("--windows", default=1200, help="Random windows in the training set; a hybrid has its own windows.")
@click.option("--hybrid", is_flag=True, help="Train a class-conditional model: its condition is the name of a clip.")
@click.option("--seed", default=0, help="Seed of the weights, the windows and the batches.")
def generator(block: str, out: Path, steps: int, windows: int, hybrid: bool, seed: int) -> None:
    """Train the generator for one block shape on tokens of the trained tokenizer."""
    config = MODELS["nbp-tiny-hybrid" if hybrid else "nbp-tiny"].with_block(block)
    file = out / "tokenizer.safetensors"
    if not file.exists():
        command = f"python -m nbp_reference.train tokenizer --out {printable(out)}"
        raise click.ClickException(f"{printable(file)} is missing: run `{command}` first")
    video_tokenizer = checkpoint.load(file).tokenizer
    assert video_tokenizer is not None  # the command above wrote it
    order = config.block.order(config.latent)
    if hybrid:
        (train, text), (held_out, held_out_text) = class_tokens(video_tokenizer, out, config)
    else:
        (train, held_out), text, held_out_text = training_tokens(video_tokenizer, out, windows, seed), None, None
    train, held_out = train[:, order], held_out[:, order]
    model = NextBlockTransformer(config)
    model.reset(seed)

    def cross_entropy(tokens: Tensor, text: Tensor | None, rows: Tensor) -> Tensor:
        inputs, target = training_pair(tokens[rows], config, text[rows] if text is not None else None)
        logits = model(inputs)[:, -target.shape[1] :]
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())

    def held_out_loss(every: int = 4) -> float:
        rows = torch.arange(0, len(held_out), every)
        return float(np.mean([cross_entropy(held_out, held_out_text, part).item() for part in rows.split(4)]))

    run = out / f"{'hybrid' if hybrid else 'generator'}-{config.block.size}"
    fit(
        model,
        lambda step: cross_entropy(train, text, batch_rows(len(train), 4, seed, step)),
        held_out_loss,
        Schedule(steps, rate=1.5e-3),
        run,
    )
    checkpoint.save(model, run.with_suffix(".safetensors"))
    with torch.inference_mode():
        loss = held_out_loss(every=1)
    entropy = unigram_entropy(held_out if hybrid else held_out[:, config.block.size :])
    click.echo(
        f"{run.name}: the held-out loss of {loss:.3f} nats per token is {1 - loss / entropy:.1%} below the unigram "
        f"entropy of {entropy:.3f}"
    )


if __name__ == "__main__":
    main()
