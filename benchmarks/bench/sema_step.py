"""What a training step of SEMA costs when the blocks below the new adapters are cached.

    python -m cl_adapters.benchmarks.bench.sema_step

Both steps (forward, backward, SGD) are run by turns in one process on one thread; the figures are medians of CPU time.
The network is a ViT of DeiT-tiny's shape with random weights, which cost what trained ones cost. "Cached" is the step
after the first task: a second adapter with its router row at the last three blocks and the head are trained on
activations read from the cache; "uncached" trains adapters in all blocks and the head, from images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Route, Routes
from cl_adapters.benchmarks.bench._command import command_of
from cl_adapters.benchmarks.bench.pool import medians
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.descriptors import Descriptors
from cl_adapters.parts.router import ExpandableRouter
from cl_adapters.predictors.mixture import MixtureOfAdapters
from cl_adapters.strategies._loop.activation_cache import HiddenStore

CLASSES = 10


def main(
    batch: Annotated[int, typer.Option(min=1)] = 32,
    side: Annotated[int, typer.Option(help="Of the images, in pixels.")] = 112,
    repeats: int = 15,
) -> None:
    """Print both medians and their ratio, and how often evaluation asks a descriptor."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = _model(side)
    assert model.bank is not None
    mixture = model.part("mixture", ExpandableRouter)
    x, y = torch.randn(batch, 3, side, side), torch.arange(batch) % CLASSES
    route = Route.single(0)
    uncached = _step(model, model.bank.slot_parameters(0), y, lambda: model.features(x, route))
    model.bank.freeze(0)  # as after the first task
    mixture.freeze()
    rows = [_expand(model, mixture, block) for block in mixture.blocks]
    new = [p for slot in range(1, 4) for p in model.bank.slot_parameters(slot)] + [p for row in rows for p in row]
    start = min(mixture.blocks)
    with torch.no_grad():
        h = model.features(x, mixture.routes(model.bank), stop=start)
    store = HiddenStore(1, len(h), h.shape[1:], 4096)
    store.write(0, 0, h)
    first = torch.zeros(len(h), dtype=torch.long)
    routes: Routes = mixture.routes(model.bank)
    cached = _step(model, new, y, lambda: model.features(store.read(first, torch.arange(len(h))), routes, start=start))
    everywhere, last = medians([_with_first(model, True, uncached), _with_first(model, False, cached)], repeats)
    per = 1000 / batch
    print(f"uncached step, adapters in all 12 blocks  {per * everywhere:7.2f} ms/image")
    print(f"cached step, adapters in the last 3       {per * last:7.2f} ms/image")
    print(f"cached / uncached                         {last / everywhere:7.3f}")
    print(f"descriptors asked during evaluation       {_descriptor_calls(model, x):7d}")


def _model(side: int) -> AdapterModel:
    vit = VisionTransformer(img_size=side, patch_size=16, embed_dim=192, depth=12, num_heads=3, num_classes=0)
    backbone = FrozenBackbone.wrap(vit)
    bank = AdapterBank(backbone, Bottleneck(scale=1.0, dropout=0.0))
    bank.add_slot(bank.fresh(torch.Generator().manual_seed(0)))
    model = AdapterModel(backbone, bank)
    model.add_task(list(range(CLASSES)))
    model.head.grow(CLASSES, torch.Generator().manual_seed(0))
    widths = {site.block: site.width for site in bank.sites if site.block >= 9}
    model.parts["mixture"], model.parts["novelty"] = ExpandableRouter(widths), Descriptors(widths, 32, 500)
    for block in widths:
        model.part("mixture", ExpandableRouter).grow(block, 0, torch.Generator().manual_seed(block))
        model.part("novelty", Descriptors).grow(block, 0, torch.Generator().manual_seed(block))
    model.predictor = MixtureOfAdapters()
    return model


def _expand(model: AdapterModel, mixture: ExpandableRouter, block: int) -> list[nn.Parameter]:
    assert model.bank is not None
    slot = model.bank.add_slot(model.bank.fresh(torch.Generator().manual_seed(block), blocks=[block]))
    return mixture.grow(block, slot, torch.Generator().manual_seed(block))


def _step(
    model: AdapterModel, adapter: list[nn.Parameter], y: Tensor, features: Callable[[], Tensor]
) -> Callable[[], None]:
    optimizer = torch.optim.SGD([*adapter, *model.head.parameters()], lr=1e-6, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.head(features()), y).backward()
        optimizer.step()

    return step


def _with_first(model: AdapterModel, trains: bool, step: Callable[[], None]) -> Callable[[], None]:
    """The step, with the first adapter trained or frozen in it."""
    assert model.bank is not None
    first = model.bank.slot_parameters(0)

    def whole() -> None:
        for parameter in first:
            parameter.requires_grad_(trains)
        step()

    return whole


def _descriptor_calls(model: AdapterModel, x: Tensor) -> int:
    calls: list[int] = []
    descriptors = model.part("novelty", Descriptors)
    for block in descriptors.blocks:
        for slot in descriptors.slots(block):
            descriptors.descriptor(block, slot).register_forward_hook(lambda module, args, out: calls.append(1))
    model.predict(x)
    return len(calls)


if __name__ == "__main__":
    command_of(main, __doc__)()
