"""Pre-train the embedded backbone ``vit_glyph_tiny`` on rendered characters; offline, one CPU core, under an hour.

    OMP_NUM_THREADS=1 python -m cl_adapters.benchmarks.glyphs.pretrain --out vit_glyph_tiny.safetensors --minutes 42

is how the shipped weights were made (7,274 steps). The classes are the "pretraining" part of ``glyph_classes``
(disjoint from the ``glyphs`` benchmark, no digits), the faces those that the benchmark does not keep for its test.
``--steps N`` in place of ``--minutes`` fixes the schedule, so that a second run on the same machine gives the same
weights.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cl_adapters.benchmarks.glyphs.batches import draw_batch, training_classes
from cl_adapters.benchmarks.glyphs.encoder import ARCHITECTURE, build_encoder, normalise
from cl_adapters.benchmarks.glyphs.probe import Probes


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyper-parameters of the run.

    Attributes:
        steps: length of the schedule; None lets ``minutes`` alone decide.
        minutes: wall-clock budget; the schedule follows whichever of the two is further on.
        min_faces: faces (of ``TRAIN_FACES``) that a character must have to become a class.
        curriculum: part of the schedule over which the images go from ``EASY`` to ``STYLE``.
        cosine_scale: factor of the cosine classifier.
        ema: decay of the averaged weights, which are what is saved.
    """

    steps: int | None = None
    minutes: float | None = 42.0
    min_faces: int = 6
    batch_size: int = 96
    lr: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.04
    label_smoothing: float = 0.1
    curriculum: float = 0.5
    cosine_scale: float = 20.0
    ema: float = 0.998
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.steps or self.minutes):
            raise ValueError("give a budget: --steps or --minutes above zero")

    def progress(self, step: int, seconds: float) -> float:
        """Return how far the schedule is, 0 to 1."""
        by_steps = step / self.steps if self.steps else 0.0
        by_time = seconds / (60 * self.minutes) if self.minutes else 0.0
        return min(1.0, max(by_steps, by_time))

    def learning_rate(self, progress: float) -> float:
        """Linear warm-up, then half a cosine down to zero."""
        if progress < self.warmup:
            return self.lr * (progress + 1e-3) / (self.warmup + 1e-3)
        return self.lr * 0.5 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


class CosineClassifier(nn.Module):
    """Scaled cosine similarity to one learned direction per class."""

    def __init__(self, width: int, num_classes: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        # Short vectors: only their direction counts, and a step of Adam turns a long one too little.
        self.weight = nn.Parameter(0.03 * torch.randn(num_classes, width, generator=generator))

    def forward(self, features: Tensor) -> Tensor:
        """Return logits float32 [B, C] of features float32 [B, D]."""
        return self.scale * F.normalize(features, dim=1) @ F.normalize(self.weight, dim=1).T


def train(recipe: Recipe, out: Path, report: Callable[[nn.Module], str], report_every: float = 300.0) -> int:
    """Run the schedule, saving the averaged encoder every ``report_every`` seconds and at the end.

    Returns:
        the number of optimizer steps.
    """
    codepoints = training_classes(recipe.min_faces)
    torch.manual_seed(recipe.seed)  # timm initialises from the global generator only
    encoder = build_encoder()
    head = CosineClassifier(
        ARCHITECTURE["embed_dim"], len(codepoints), recipe.cosine_scale, torch.Generator().manual_seed(recipe.seed)
    )
    average = AveragedModel(encoder, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
    optimizer = torch.optim.AdamW(_groups(encoder, head, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.98))
    print(f"{len(codepoints)} classes, {sum(p.numel() for p in encoder.parameters())} parameters", flush=True)
    start, told, step, running = time.monotonic(), time.monotonic(), 0, 0.0
    while (progress := recipe.progress(step, time.monotonic() - start)) < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(progress)
        images, labels = draw_batch(
            codepoints, recipe.batch_size, (recipe.seed, step), min(1.0, progress / recipe.curriculum)
        )
        loss = F.cross_entropy(head(encoder(normalise(images))), labels, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(encoder)
        step += 1
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % 100 == 0:
            print(f"step {step} {progress:.1%} {time.monotonic() - start:.0f} s loss {running:.3f}", flush=True)
        if time.monotonic() - told > report_every:
            save(average.module, out)
            print(f"step {step}: {report(average.module)}", flush=True)
            told = time.monotonic()
    save(average.module, out)
    print(f"step {step}, done: {report(average.module)}", flush=True)
    return step


def _groups(encoder: nn.Module, head: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    plain: list[Tensor] = []
    decayed: list[Tensor] = []
    for name, p in [*encoder.named_parameters(), *head.named_parameters()]:
        (plain if p.ndim <= 1 or "pos_embed" in name else decayed).append(p)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def save(encoder: nn.Module, path: Path) -> None:
    """Write the weights as float16, by way of a temporary file, so that a crash never leaves half a file."""
    state = {name: value.detach().to(torch.float16).contiguous() for name, value in encoder.state_dict().items()}
    part = path.with_name(path.name + ".part")
    save_file(state, part)
    part.chmod(0o644)  # safetensors makes it readable for its owner only
    os.replace(part, path)


def main() -> None:
    """Parse the budget, train, print the figures of the model card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="file for the weights (.safetensors)")
    parser.add_argument("--minutes", type=float, help="wall-clock budget (42 where --steps is not given)")
    parser.add_argument("--steps", type=int, help="length of the schedule in optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    minutes = 42.0 if options.steps is None and options.minutes is None else options.minutes
    train(Recipe(steps=options.steps, minutes=minutes, seed=options.seed), options.out, Probes().report)


if __name__ == "__main__":
    main()
