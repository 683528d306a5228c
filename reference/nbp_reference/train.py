"""Makes the nbp-tiny weights from the clips' train parts: `python -m nbp_reference.train --help`.

Every batch is drawn from (seed, step), so an interrupted run resumes on the same path.
Shape legend: B batch, F frames, H×W pixels, T tokens.
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

from nbp_reference import checkpoint, clips
from nbp_reference.config import MODELS, TOKENIZERS, ModelConfig
from nbp_reference.model import NextBlockTransformer, training_pair
from nbp_reference.tokenizer import CausalConv3d, DepthToSpace, FrameGroupNorm, ResidualUnit, VideoTokenizer

SIDE = 128  # pixels
FRAMES = 17
CROP, CROP_FRAMES = 96, 9  # what the tokenizer trains on: causal and convolutional, it works at any size
CHECK_EVERY = 200  # steps


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up and a cosine down to zero."""

    steps: int
    rate: float
    warmup: int = 50
    decay: float = 0.05

    def at(self, step: int) -> float:
        """Learning rate of a step."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


@cache
def parts() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The train and held-out parts of every clip, uint8 [F,3,H,W], shorter side 128."""
    train, held = zip(*(clips.split(clips.read(clips.find(name), SIDE)) for name in clips.CLIPS), strict=True)
    return list(train), list(held)


def to_video(frames: list[np.ndarray]) -> Tensor:
    """Windows of uint8 [F,3,H,W] as one float batch [B,3,F,H,W] in [0,1]."""
    return torch.from_numpy(np.stack(frames)).transpose(1, 2).float() / 255


def centred_windows(videos: list[np.ndarray], stride: int) -> list[list[np.ndarray]]:
    """Centred 128×128 windows of each video."""
    return [clips.windows(clips.centre(video, SIDE), FRAMES, stride) for video in videos]


def held_out_windows(stride: int = 8) -> list[np.ndarray]:
    """Centred 128×128 windows of the held-out parts."""
    return list(chain(*centred_windows(parts()[1], stride)))


def random_window(videos: list[np.ndarray], rng: np.random.Generator, frames: int, side: int) -> np.ndarray:
    """A random run of frames, random square, randomly mirrored; longer videos come up more often."""
    weights = np.sqrt([len(v) - frames + 1 for v in videos])
    video = videos[rng.choice(len(videos), p=weights / weights.sum())]
    f, y, x = (rng.integers(0, n + 1) for n in (len(video) - frames, video.shape[2] - side, video.shape[3] - side))
    window = video[f : f + frames, :, y : y + side, x : x + side]
    return window[..., ::-1] if rng.random() < 0.5 else window


def fit(
    model: nn.Module, loss_of: Callable[[int], Tensor], evaluate: Callable[[], float], schedule: Schedule, run: Path
) -> None:
    """Train `model` in place, writing `run`.resume every 200 steps and a line of `run`.jsonl with the losses."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": schedule.decay},
        {"params": plain, "weight_decay": 0.0},
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
            group["lr"] = schedule.at(step)
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
                held = evaluate()
            row = {"step": done, "train": float(np.mean(losses)), "held_out": held}
            with curve.open("a") as file:
                file.write(json.dumps(row) + "\n")
            pace = (time.monotonic() - began) / (done - start)
            click.echo(f"{run.name} {done}/{schedule.steps}  {row}  {pace:.2f} s a step")
            losses.clear()
            partial = resume.with_suffix(".partial")
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": done}, partial)
            partial.replace(resume)


def opponent_means(video: Tensor) -> Tensor:
    """Each token's mean brightness, red against blue, green against both, near unit deviation: [B,T,h,w,3]."""
    first, rest = F.avg_pool3d(video[:, :, :1], (1, 8, 8)), F.avg_pool3d(video[:, :, 1:], (4, 8, 8))
    r, g, b = torch.cat([first, rest], 2).unbind(1)
    return torch.stack([(r + g + b - 1.35) / 0.75, (r - b) / 0.12, (g - (r + b) / 2) / 0.06], -1)


def block_means(videos: list[np.ndarray]) -> np.ndarray:
    """The mean colour behind each token: float64 [tokens,3]; the first frame's blocks are one frame deep."""
    rows = []
    for video in videos:
        small = video.reshape(FRAMES, 3, SIDE // 8, 8, SIDE // 8, 8).mean((3, 5)) / 255
        latent = np.concatenate([small[:1], small[1:].reshape(-1, 4, *small.shape[1:]).mean(1)])
        rows.append(latent.transpose(0, 2, 3, 1).reshape(-1, 3))
    return np.concatenate(rows)


def kmeans_psnr(train: list[np.ndarray], held: list[np.ndarray], codes: int) -> float:
    """PSNR in dB of painting each block with the nearest of `codes` colours learned by k-means: equal bits a token."""
    from scipy.cluster.vq import kmeans2, vq

    centroids, _ = kmeans2(block_means(train), codes, seed=0, minit="++", iter=20)
    colours = centroids[vq(block_means(held), centroids)[0]].reshape(len(held), -1, SIDE // 8, SIDE // 8, 3)
    frames = np.concatenate([colours[:, :1], colours[:, 1:].repeat(4, 1)], 1).repeat(8, 2).repeat(8, 3)
    truth = np.stack(held).transpose(0, 1, 3, 4, 2) / 255
    return float(-10 * np.log10(((frames - truth) ** 2).mean()))


def unigram_entropy(tokens: Tensor) -> float:
    """Entropy in nats of the tokens' own distribution: what a model without context reaches at best."""
    share = torch.bincount(tokens.flatten()).double() / tokens.numel()
    return float(torch.special.entr(share).sum())


def encode_all(tokenizer: VideoTokenizer, windows: list[np.ndarray]) -> Tensor:
    """Tokens int64 [windows, 1280], raster order."""
    with torch.inference_mode():
        return torch.cat([tokenizer.encode(to_video([w])) for w in windows])


def start_linear(model: VideoTokenizer) -> None:
    """Start as a linear autoencoder that already keeps brightness and upsamples smoothly.

    Residual units begin as identities. Convolutions before a depth-to-space give every sub-pixel the same, which is
    plain upsampling. The biases between are spread out: GroupNorm takes a frame's mean and deviation away, and with
    them how bright it is, unless channels that are constant hold the statistics still.
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
    """Scale the convolution before the decoder's last GroupNorm down, by a power of two, which changes nothing else.

    The norm takes any scale away, so nothing keeps the weights before it from growing, here until activations reached
    237,000: infinity in fp16, and NaN after the norm.
    """
    norm = next(i for i, layer in enumerate(model.decoder_layers) if isinstance(layer, FrameGroupNorm))
    before, conv = model.decoder_layers[: norm - 1], model.decoder_layers[norm - 2]
    assert isinstance(conv, CausalConv3d)
    with torch.no_grad():
        codes = (model.fsq.quantize(model.latents(to_video([w]))) for w in windows)
        reached = max(float(before(c.permute(0, 4, 1, 2, 3)).abs().max()) for c in codes)
        for parameter in conv.parameters():
            parameter.div_(2.0 ** max(0, math.ceil(math.log2(reached / largest))))


@click.group()
def main() -> None:
    """Train the nbp-tiny weights."""


@main.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), help="Folder of the run.")
@click.option("--steps", default=3000)
@click.option("--seed", default=0)
def tokenizer(out: Path, steps: int, seed: int) -> None:
    """The tokenizer, by mean squared error on 9×96×96 crops."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    model = VideoTokenizer(TOKENIZERS["nbp-tiny"]).to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    start_linear(model)
    train, _ = parts()
    held = held_out_windows()

    def error(video: Tensor, latents: Tensor) -> Tensor:
        return F.mse_loss(model.reconstruct(model.fsq.quantize(latents)).float(), video)

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng((seed, step))
        video = to_video([random_window(train, rng, CROP_FRAMES, CROP) for _ in range(2)])
        latents = model.latents(video).float()
        # Left alone, the quantiser starts with a few grey codes and stays there: first show it colour.
        guide = max(0.0, 1 - step / (0.25 * steps))
        return error(video, latents) + 0.1 * guide * F.mse_loss(latents[..., :3], opponent_means(video))

    def psnr(windows: list[np.ndarray]) -> float:
        videos = (to_video([w]) for w in windows)
        return -10 * math.log10(np.mean([error(v, model.latents(v).float()).item() for v in videos]))

    fit(model, loss_of, lambda: psnr(held[::5]), Schedule(steps, rate=2e-3), out / "tokenizer")
    shrink_to_fp16(model, held[::5])
    checkpoint.save(model, out / "tokenizer.safetensors")
    with torch.inference_mode():
        reached = psnr(held)
    floor = kmeans_psnr([clips.centre(v, SIDE)[:FRAMES] for v in train], held, model.config.vocab)
    click.echo(f"held-out PSNR {reached:.2f} dB; k-means of block means at equal bits {floor:.2f} dB")


def class_tokens(model: VideoTokenizer, out: Path, config: ModelConfig) -> list[tuple[Tensor, Tensor]]:
    """Train and held-out tokens int64 [windows,1280] with the text [windows,P] that names each one's clip; made once.

    Windows are centred and not mirrored: a model this small learns few pictures, and each clip should be one.
    """
    file = out / "class-tokens.npz"
    assert config.text is not None
    if not file.exists():
        made: dict[str, Any] = {}
        for name, videos in zip(("train", "held"), parts(), strict=True):
            groups = centred_windows(videos, stride=2)
            ids = [config.text.words.index(clip) for clip in clips.CLIPS]
            made[name] = encode_all(model, list(chain(*groups))).numpy().astype(np.int16)
            made[f"{name}_class"] = np.repeat(ids, [len(group) for group in groups])
        np.savez_compressed(file, **made)
    saved = np.load(file)
    pairs = []
    for name in ("train", "held"):
        text = torch.zeros(len(saved[name]), config.text.tokens, dtype=torch.long)
        text[:, 0] = torch.from_numpy(saved[f"{name}_class"])
        pairs.append((torch.from_numpy(saved[name]).long(), text))
    return pairs


def training_tokens(model: VideoTokenizer, out: Path, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Train and held-out tokens int64 [windows,1280], made once a run."""
    file = out / "tokens.npz"
    if not file.exists():
        rng = np.random.default_rng(seed)
        train = [random_window(parts()[0], rng, FRAMES, SIDE) for _ in range(count)]
        tokens, held = encode_all(model, train), encode_all(model, held_out_windows(stride=4))
        np.savez_compressed(file, train=tokens.numpy().astype(np.int16), held=held.numpy().astype(np.int16))
    saved = np.load(file)
    return torch.from_numpy(saved["train"]).long(), torch.from_numpy(saved["held"]).long()


def batch(rows: int, size: int, seed: int, step: int) -> Tensor:
    """Which of the rows make up a step's batch, int64 [size]."""
    return torch.from_numpy(np.random.default_rng((seed, step)).integers(0, rows, size))


@main.command()
@click.option("--block", required=True, help="Block shape or size, such as 1x1x16.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs"), help="Folder of the run.")
@click.option("--steps", default=600)
@click.option("--windows", default=1200, help="Random windows in the training set.")
@click.option("--hybrid", is_flag=True, help="Class-conditional: told the name of a clip, given no frames.")
@click.option("--seed", default=0)
def generator(block: str, out: Path, steps: int, windows: int, hybrid: bool, seed: int) -> None:
    """The generator of one block shape, on the tokens of the trained tokenizer."""
    config = MODELS["nbp-tiny-hybrid" if hybrid else "nbp-tiny"].with_block(block)
    file = out / "tokenizer.safetensors"
    if not file.exists():
        raise click.ClickException(f"{file} is missing: run `python -m nbp_reference.train tokenizer --out {out}`")
    eyes = checkpoint.load(file).tokenizer
    assert eyes is not None  # the command above wrote it
    order = config.block.order(config.latent)
    if hybrid:
        (train, text), (held, held_text) = class_tokens(eyes.eval(), out, config)
    else:
        (train, held), text, held_text = training_tokens(eyes.eval(), out, windows, seed), None, None
    train, held = train[:, order], held[:, order]
    model = NextBlockTransformer(config)
    model.reset(seed)

    def cross_entropy(tokens: Tensor, text: Tensor | None, rows: Tensor) -> Tensor:
        read, target = training_pair(tokens[rows], config, text[rows] if text is not None else None)
        logits = model(read)[:, -target.shape[1] :]
        return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())

    def held_out(every: int = 4) -> float:
        rows = torch.arange(0, len(held), every)
        return float(np.mean([cross_entropy(held, held_text, part).item() for part in rows.split(4)]))

    run = out / f"{'hybrid' if hybrid else 'generator'}-{config.block.size}"
    fit(
        model,
        lambda step: cross_entropy(train, text, batch(len(train), 4, seed, step)),
        held_out,
        Schedule(steps, rate=1.5e-3),
        run,
    )
    checkpoint.save(model, run.with_suffix(".safetensors"))
    with torch.inference_mode():
        loss = held_out(every=1)
    entropy = unigram_entropy(held if hybrid else held[:, config.block.size :])
    click.echo(
        f"{run.name}: held-out loss {loss:.3f} nats, unigram entropy {entropy:.3f}: {1 - loss / entropy:.1%} below"
    )


if __name__ == "__main__":
    main()
