"""What the contract tests share: variants of every adapter type, tiny backbones of every family, filled banks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cl_adapters.adapters import adapters
from cl_adapters.adapters.base import AdapterType
from cl_adapters.backbone import FrozenBackbone
from cl_adapters.bank import AdapterBank
from cl_adapters.batches import Inputs


def variants(cls: type[AdapterType]) -> Iterator[tuple[str, AdapterType]]:
    """The type with its defaults, each of its choices one at a time, and all of them at once."""
    default: Any = cls()
    yield "default", default
    hints = get_type_hints(cls)
    last: dict[str, Any] = {}
    for field in dataclasses.fields(default):
        hint = hints[field.name]
        options = get_args(hint) if get_origin(hint) is Literal else (True, False) if hint is bool else ()
        for option in options:
            if option != getattr(default, field.name):
                last[field.name] = option
                yield f"{field.name}={option}", dataclasses.replace(default, **{field.name: option})
    if len(last) > 1:
        yield "every other choice", dataclasses.replace(default, **last)


VARIANTS = [
    pytest.param(adapter, id=f"{name} {label}")
    for name in adapters.names()
    for label, adapter in variants(adapters.get(name))
]


@pytest.fixture(params=VARIANTS)
def adapter(request: pytest.FixtureRequest) -> AdapterType:
    """Every registered adapter type in every choice of its options."""
    chosen: AdapterType = request.param
    return chosen


# --- backbones ----------------------------------------------------------------------------------------------

IMAGE: dict[str, Any] = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}


def _vit(**options: Any) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(**{**IMAGE, "num_classes": 0, **options})


def _deit_distilled() -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return VisionTransformerDistilled(**IMAGE, num_classes=0)


def _swiglu() -> nn.Module:
    from timm.layers import SwiGLUPacked

    return _vit(reg_tokens=4, no_embed_class=True, init_values=1e-5, mlp_layer=SwiGLUPacked, mlp_ratio=4)


def _res_post() -> nn.Module:
    from timm.models.vision_transformer import ResPostBlock

    return _vit(block_fn=ResPostBlock, init_values=0.5)


def _eva() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(**IMAGE, num_classes=0, use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, init_values=0.1)


def _eva_post_norm() -> nn.Module:
    from timm.models.eva import Eva

    return Eva(**IMAGE, num_classes=0, use_post_norm=True)


def _beit() -> nn.Module:
    from timm.models.beit import Beit

    return Beit(**IMAGE, num_classes=0, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1)


def _rel_pos(res_post: bool) -> nn.Module:
    from timm.models.vision_transformer_relpos import RelPosBlock, ResPostRelPosBlock, VisionTransformerRelPos

    return VisionTransformerRelPos(**IMAGE, num_classes=0, block_fn=ResPostRelPosBlock if res_post else RelPosBlock)


def _bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    model: nn.Module = transformers.BertModel(config, add_pooling_layer=False)
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "ViT": _vit,
    "ViT with a classifier": lambda: _vit(num_classes=5),
    "ViT, other sizes": lambda: _vit(img_size=24, patch_size=4, embed_dim=24, depth=3, num_heads=3, qkv_bias=False),
    "ViT, mean pooling, no class token": lambda: _vit(global_pool="avg", class_token=False),
    "DeiT distilled": _deit_distilled,
    "DINOv2: LayerScale, registers": lambda: _vit(init_values=1e-5, reg_tokens=4, no_embed_class=True),
    "DINOv2 giant: SwiGLU": _swiglu,
    "CLIP: norm before the blocks": lambda: _vit(pre_norm=True),
    "SigLIP: attention pooling": lambda: _vit(global_pool="map", class_token=False),
    "drop path while training": lambda: _vit(drop_path_rate=0.5, proj_drop_rate=0.5, attn_drop_rate=0.5),
    "ViT, residual post-norm": _res_post,
    "EVA: rotary, SwiGLU": _eva,
    "EVA, post-norm": _eva_post_norm,
    "BEiT: relative positions": _beit,
    "relative positions": lambda: _rel_pos(False),
    "relative positions, residual post-norm": lambda: _rel_pos(True),
    "BERT": _bert,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A backbone of one family, with inputs that it takes."""

    family: str
    backbone: FrozenBackbone

    def inputs(self, n: int, seed: int = 0) -> Inputs:
        """Images float32 [n, 3, H, W]; for text, token ids int64 [n, 7] with masks of different lengths."""
        generator = torch.Generator().manual_seed(seed)
        if self.family == "BERT":
            lengths = 2 + torch.arange(n) % 6
            ids = torch.randint(1, 50, (n, 7), generator=generator)
            return {"input_ids": ids, "attention_mask": (torch.arange(7) < lengths[:, None]).long()}
        side = 24 if "other sizes" in self.family else 16
        return torch.randn(n, 3, side, side, generator=generator)


def draw_(module: nn.Module, seed: int) -> nn.Module:
    """Draw every parameter from the seed, so that no term is zero by its initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * noise)
    return module


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    """A fresh tiny backbone of every family."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = FAMILIES[request.param]()
    return Case(request.param, FrozenBackbone.wrap(draw_(module, 1)))


Filled = Callable[..., AdapterBank]


@pytest.fixture
def filled() -> Filled:
    """Factory of banks with random adapters: ``filled(backbone, adapter, slots=3)``."""

    def make(backbone: FrozenBackbone, adapter: AdapterType, slots: int = 3, size: float = 0.3) -> AdapterBank:
        bank = AdapterBank(backbone, adapter)
        for slot in range(slots):
            generator = torch.Generator().manual_seed(100 + slot)
            tensors: dict[str, Tensor] = bank.fresh(generator)
            bank.add_slot({k: size * torch.randn(v.shape, generator=generator) for k, v in tensors.items()})
        return bank

    return make


# --- strategies ------------------------------------------------------------------------------------------------

TASKS = ((7, 3), (11,), (0, 5))
STYLES = ("sets", "targets only", "lists", "lists, renumbered", "class incremental")


class NoisyImages(Dataset[tuple[Tensor, int]]):
    """Images float32 [3, 16, 16] of a class colour; every look adds noise from each global generator."""

    def __init__(self, labels: Sequence[int], per_class: int, seed: int, noise: float = 0.2) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = [label for label in labels for _ in range(per_class + label % 3)]
        colours = torch.randn(20, 3, 1, 1, generator=torch.Generator().manual_seed(0))
        rows = torch.tensor(self.targets)
        self.images = colours[rows] + 0.3 * torch.randn(len(rows), 3, 16, 16, generator=generator)
        self.noise = noise

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        drawn = torch.randn(1).item() + float(np.random.randn()) + random.random()
        return self.images[index] + self.noise * drawn, self.targets[index]


def make_benchmark(style: str, per_class: int = 4, tasks: Sequence[Sequence[int]] = TASKS) -> Any:
    """An Avalanche benchmark of three unequal tasks in one of the styles in which experiences come.

    Classes as a set, as a list, or only in the targets; labels with gaps, or shuffled ones (in "class incremental",
    where Avalanche takes no gaps).
    """
    from avalanche import benchmarks as a

    order = [label for task in tasks for label in task]
    if style == "class incremental":
        small = {label: position for position, label in enumerate(sorted(order))}
        order = [small[label] for label in order]
        data = {"train": NoisyImages(range(5), per_class, 1), "test": NoisyImages(range(5), 2, 2, noise=0)}
        return a.class_incremental_benchmark(data, class_order=order, num_classes_per_exp=[len(t) for t in tasks])
    if style.startswith("lists"):
        sizes = {position: len(task) for position, task in enumerate(tasks)}
        train, test = NoisyImages(order, per_class, 1), NoisyImages(order, 2, 2, noise=0)
        return a.nc_benchmark(
            train,
            test,
            len(tasks),
            task_labels=False,
            fixed_class_order=order,
            per_exp_classes=sizes,
            class_ids_from_zero_from_first_exp=style == "lists, renumbered",
        )
    splits = {"train": [NoisyImages(t, per_class, 1) for t in tasks], "test": [NoisyImages(t, 2, 2, 0) for t in tasks]}
    streams = {name: [experience_data(part) for part in parts] for name, parts in splits.items()}
    made = a.benchmark_from_datasets(**streams)
    return a.with_classes_timeline(made) if style == "sets" else made


def experience_data(data: Any) -> Any:
    """An AvalancheDataset with targets."""
    from avalanche.benchmarks.utils import AvalancheDataset, DataAttribute

    return AvalancheDataset([data], data_attributes=[DataAttribute(list(data.targets), "targets")])


SMALL_OPTIONS: dict[str, Any] = {
    "train_epochs": 2,
    "train_mb_size": 4,
    "eval_mb_size": 5,
    "lr": 0.05,
    "adapter": {"type": "bottleneck", "bottleneck": 4},
    "alignment": {"epochs": 2},
}
"""Options that make training quick; a strategy gets those that its configuration has."""


class Lab:
    """What a test of a strategy needs; reached through the fixture ``lab``."""

    tasks = TASKS
    styles = STYLES
    images = NoisyImages
    benchmark = staticmethod(make_benchmark)
    experience_data = staticmethod(experience_data)

    def __init__(self, tiny_vit: Callable[..., nn.Module]) -> None:
        self.tiny_vit = tiny_vit

    def vit(self) -> nn.Module:
        """The same random ViT every time."""
        return self.tiny_vit(width=16, heads=2, img_size=16, depth=2)

    def make(self, name: str, *, model: nn.Module | None = None, seed: int = 5, **options: Any) -> Any:
        """A small strategy of that registered name; ``options`` as its constructor takes them."""
        from cl_adapters.strategies.base import strategies

        cls: Any = strategies.get(name)
        known = {field.name for field in dataclasses.fields(cls.Config)}
        small = {key: value for key, value in SMALL_OPTIONS.items() if key in known}
        return cls(model=model or self.vit(), seed=seed, **{"evaluator": None, **small, **options})

    def probe(self, n: int = 9) -> Tensor:
        """Images float32 [n, 3, 16, 16] of no particular class."""
        return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(11))

    def state(self, strategy: Any) -> dict[str, Any]:
        """Every tensor of a strategy and its model, and what else evaluation must leave alone."""
        model = strategy.model
        found: dict[str, Any] = {f"model.{key}": value.clone() for key, value in model.state_dict().items()}
        if model.statistics is not None:
            found |= {f"statistics.{key}": value.clone() for key, value in model.statistics.tensors().items()}
        found["task_of_column"] = model.task_of_column.clone()
        found["classes"] = list(model.classes)
        found["predictor"] = model.predictor
        found["requires_grad"] = {key: value.requires_grad for key, value in model.named_parameters()}
        found["rng"] = (torch.get_rng_state(), random.getstate(), str(np.random.get_state()))
        return found

    def same(self, first: dict[str, Any], second: dict[str, Any]) -> list[str]:
        """Keys that differ between two states, bit for bit."""
        return [key for key in first.keys() | second.keys() if not _equal(first.get(key), second.get(key))]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(a == b)


@pytest.fixture
def lab(tiny_vit: Callable[..., nn.Module]) -> Lab:
    """Benchmarks, small strategies and their states."""
    return Lab(tiny_vit)
