"""Cached views: what is read back is what the backbone would compute, and training on it is the same training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.errors import ClAdaptersError, ConfigError, IncompatibleBackbone
from cl_adapters.model.facade import AdapterModel
from cl_adapters.strategies import MOS, SEMA
from cl_adapters.strategies._loop.activation_cache import ActivationCache, CachedLoader, HiddenStore

DEPTH = 4


class Pictures(Dataset[tuple[Tensor, int]]):
    """Images float32 [3, 16, 16] of one colour per class, with noise from the global generator."""

    def __init__(self, labels: list[int], noise: float) -> None:
        generator = torch.Generator().manual_seed(sum(labels))
        self.targets = labels
        colours = torch.randn(20, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        self.images = colours[torch.tensor(labels)] + 0.3 * torch.randn(len(labels), 3, 16, 16, generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index] + self.noise * torch.randn(3, 1, 1), self.targets[index]


@pytest.fixture
def vit(tiny_vit: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: tiny_vit(width=16, heads=2, img_size=16, depth=DEPTH)


@pytest.fixture
def model(vit: Callable[[], nn.Module]) -> AdapterModel:
    backbone = FrozenBackbone.wrap(vit())
    bank = AdapterBank(backbone, Bottleneck(bottleneck=3))
    generator = torch.Generator().manual_seed(0)
    bank.add_slot({k: torch.randn(v.shape, generator=generator) for k, v in bank.fresh(generator).items()})
    return AdapterModel(backbone, bank)


def views_of(model: AdapterModel, noise: float = 0.0, k: int = 1, memory_mb: float = 100.0) -> ActivationCache:
    return ActivationCache(
        model, Pictures([3] * 4 + [7] * 3, noise), seeds=list(range(k)), batch=3, memory_mb=memory_mb
    )


# --- the store ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_mb", [1.0, 1e-6])
def test_store_gives_back_what_was_written(memory_mb: float) -> None:
    data = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    store = HiddenStore(2, 5, (3, 4), memory_mb)
    assert store.on_disk == (memory_mb < 1)
    for view in range(2):
        store.write(view, 0, data[view, :2])
        store.write(view, 2, data[view, 2:])
    views, rows = torch.tensor([1, 0, 1]), torch.tensor([4, 0, 2])
    read = store.read(views, rows)
    assert read.dtype == torch.float32
    wanted = data[views, rows]
    assert torch.equal(read, wanted.half().float() if store.on_disk else wanted)


def test_store_refuses_what_half_precision_cannot_hold() -> None:
    store = HiddenStore(1, 1, (2,), 1e-9)
    with pytest.raises(ClAdaptersError, match="cache_memory_mb"):
        store.write(0, 0, torch.tensor([[1.0, 1e6]]))


def test_a_batch_of_less_than_one_is_refused(model: AdapterModel) -> None:
    with pytest.raises(ConfigError, match=r"batch has to be a whole number, at least 1; got 0"):
        ActivationCache(model, Pictures([3], 0.0), seeds=[0], batch=0, memory_mb=1.0)


# --- the views ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [None, 1, 2])
@pytest.mark.parametrize("block", range(1, DEPTH + 1))
def test_every_depth_from_the_images_or_from_a_shallower_one(
    model: AdapterModel, first: int | None, block: int
) -> None:
    views, route = views_of(model), Route.single(0)
    if first is not None:
        views.at(first, route)
    rows = torch.arange(len(views))
    read = views.at(block, route).read(torch.zeros_like(rows), rows)
    x = Pictures([3] * 4 + [7] * 3, 0.0).images
    with torch.no_grad():
        wanted = model.features(x, route, stop=block)
        features = model.features(read, route, start=block)
        assert torch.allclose(features, model.features(x, route), atol=1e-5)
    assert torch.allclose(read, wanted, atol=1e-5)
    assert views.labels.tolist() == [3] * 4 + [7] * 3


def test_a_view_is_augmented_once_and_views_differ(model: AdapterModel) -> None:
    views, route = views_of(model, noise=1.0, k=2), Route.single(0)
    before = torch.get_rng_state()
    rows = torch.arange(7)
    deep = [views.at(3, route).read(torch.full_like(rows, view), rows) for view in range(2)]
    assert not torch.allclose(deep[0], deep[1])
    views.changed(0)  # everything anew, from images augmented anew: the same images
    again = [views.at(3, route).read(torch.full_like(rows, view), rows) for view in range(2)]
    assert torch.equal(deep[0], again[0])
    assert torch.equal(deep[1], again[1])
    assert torch.equal(torch.get_rng_state(), before)


def test_what_lies_behind_a_changed_adapter_is_computed_anew(model: AdapterModel) -> None:
    views, route = views_of(model), Route.single(0)
    old = {block: views.at(block, route) for block in (1, 2, 3)}
    views.changed(2)
    assert {block: views.at(block, route) is store for block, store in old.items()} == {1: True, 2: True, 3: False}


def test_loader_gives_every_image_once_in_a_new_order(model: AdapterModel) -> None:
    views = views_of(model, noise=1.0, k=3)
    seeds: Iterator[int] = iter(range(9))
    loader = CachedLoader(views, 2, Route.single(0), batch=4, draw=lambda: torch.Generator().manual_seed(next(seeds)))
    assert len(loader) == 2
    passes = [list(loader) for _ in range(2)]
    for batches in passes:
        assert [len(h) for h, *_ in batches] == [4, 3]
        assert sorted(torch.cat([y for _, y, _ in batches]).tolist()) == [3] * 4 + [7] * 3
    assert not torch.equal(passes[0][0][0], passes[1][0][0])


# --- training -----------------------------------------------------------------------------------------------

TASKS = ([3, 7], [1], [0, 5])


def train(strategy: Any, noise: float) -> Any:
    from avalanche.benchmarks import benchmark_from_datasets, with_classes_timeline
    from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute

    def data(task: list[int]) -> Any:
        pictures = Pictures([label for label in task for _ in range(6)], noise)
        return AvalancheDataset([pictures], data_attributes=[DataAttribute(pictures.targets, "targets")])

    stream = with_classes_timeline(benchmark_from_datasets(train=[data(task) for task in TASKS])).train_stream
    for experience in stream:
        strategy.train(experience)
    return strategy


def compare(first: Any, second: Any, atol: float) -> None:
    a, b = first.model.state_dict(), second.model.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert torch.allclose(a[key], b[key], atol=atol), key


def small_sema(vit: Callable[[], nn.Module], **options: Any) -> Any:
    settings = {"descriptor_dim": 3, "descriptor_epochs": 3, "train_epochs": 3, "train_mb_size": 4, "last_blocks": 2}
    defaults = {"threshold": 0.9, "scan_mb_size": 5, "lr": 0.02, "buffer": 30, "seed": 3, "evaluator": None}
    return SEMA(model=vit(), **{**settings, **defaults, **options})


def test_sema_on_one_view_without_augmentation_is_sema_uncached(vit: Callable[[], nn.Module]) -> None:
    plain = train(small_sema(vit), 0.0)
    cached = train(small_sema(vit, cached_views=1), 0.0)
    slots = {block: plain.mixture.slots(block) for block in plain.mixture.blocks}
    assert sum(map(len, slots.values())) > 2, "something expanded, or this compares little"
    assert slots == {block: cached.mixture.slots(block) for block in cached.mixture.blocks}
    compare(plain, cached, 1e-4)
    x = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(plain.model.predict(x), cached.model.predict(x), atol=1e-4)


def test_sema_from_disk_in_half_precision_is_nearly_the_same(vit: Callable[[], nn.Module]) -> None:
    memory = train(small_sema(vit, cached_views=1, threshold=50.0), 0.0)
    disk = train(small_sema(vit, cached_views=1, threshold=50.0, cache_memory_mb=0.0), 0.0)
    compare(memory, disk, 0.02)


def test_mos_with_late_adapters_on_one_view(vit: Callable[[], nn.Module]) -> None:
    """With one batch per epoch the order within the batch is all that differs."""

    def make(k: int) -> Any:
        adapter = Bottleneck(bottleneck=3, dropout=0.0)
        options: dict[str, Any] = {"adapter": adapter, "train_epochs": 3, "train_mb_size": 50, "lr": 0.05}
        return train(MOS(model=vit(), evaluator=None, seed=3, blocks=(2, 3), cached_views=k, **options), 0.0)

    compare(make(0), make(1), 1e-4)


def test_what_is_cached_is_computed_once(vit: Callable[[], nn.Module]) -> None:
    strategy = small_sema(vit, cached_views=2, threshold=50.0, eval_mb_size=6)
    calls: list[int] = []
    encoder: Any = strategy.model.backbone.encoder
    encoder.patch_embed.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    train(strategy, 1.0)
    task_0 = 12 * 3 + 12 * 2  # epochs of the first task, then two views for its descriptors
    assert sum(calls) == task_0 + 6 * 2 + 12 * 2


def test_a_backbone_that_cannot_be_entered_says_so_at_once(vit: Callable[[], nn.Module]) -> None:
    from timm.models.swin_transformer import SwinTransformer

    swin = SwinTransformer(
        img_size=16, patch_size=2, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(2, 2), num_classes=0
    )
    with pytest.raises(IncompatibleBackbone, match="cached_views=0"):
        SEMA(model=swin, evaluator=None, cached_views=1)
