"""A small model for tests: random adapters, heads, prototypes and keys, all different for each class and task."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.state import Origin
from cl_adapters.parts.keys import CLASS_KEYS, Keys, KeysConfig


def random_model(
    backbone: FrozenBackbone,
    tasks: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    blocks: Sequence[int] | None = None,
    held_out: float = 0.0,
    keys_per_class: int = 3,
    features: Callable[[int], Tensor] | None = None,
    merged: bool = False,
) -> AdapterModel:
    """A model with one adapter per task, far from the identity, and keys of kind "features".

    Args:
        backbone: of the model.
        tasks: labels of the classes of each task.
        seed: of everything random.
        blocks: that have adapters; default all.
        held_out: share of the keys that are held back.
        keys_per_class: random ones, or
        features: those of a label, float32 [N, D].
        merged: name the adapters before it as parents of each, as MOS does.
    """
    width, draw = backbone.num_features, torch.Generator().manual_seed(seed)
    bank = AdapterBank(backbone, Bottleneck(bottleneck=4, scale=1.0), blocks=blocks)
    model = AdapterModel(backbone, bank)
    model.parts[CLASS_KEYS] = keys = Keys(KeysConfig(kind="features", held_out=held_out), width)
    for task, labels in enumerate(tasks):
        model.add_task(list(labels))
        shapes = {name: value.shape for name, value in bank.fresh(draw).items()}
        slot = bank.add_slot({name: 0.5 * torch.randn(shape, generator=draw) for name, shape in shapes.items()})
        model.assign_new_slots(task)
        if merged:
            merge = {"method": "ema", "momentum": 0.1, "head": "aligned"}
            model.origins[slot] = Origin(parents=tuple(range(slot)), merge=merge if slot else None)
        model.head.grow(len(labels), draw)
        for label in labels:
            with torch.no_grad():
                found = torch.randn(keys_per_class, width, generator=draw) if features is None else features(label)
            keys.add_class(found, draw)
    with torch.no_grad():
        model.head.weight.normal_(generator=draw)
        model.head.bias.normal_(generator=draw)
    model.prototypes.append(torch.randn(len(model.classes), width, generator=draw))
    return model
