"""Settings shared by the strategies."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from cl_adapters.adapters.base import AdapterField
from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.config import OMITTED_AT_DEFAULT, build, check_blocks, check_range, to_plain
from cl_adapters.errors import ConfigError, suggestion

OptimizerName = Literal["sgd", "adam", "adamw"]
ScheduleName = Literal["cosine", "constant"]
"""How the learning rate goes from epoch to epoch of a phase: down to 0, or not at all."""

LARGEST_BATCH = 2**20
"""Samples; a loader sets aside a list of that length."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrategyConfig:
    """Settings that every strategy has.

    Attributes:
        train_mb_size: training batch size.
        eval_mb_size: batch size of evaluation and statistics.
    """

    train_mb_size: int = 48
    eval_mb_size: int = 128

    def __post_init__(self) -> None:
        if self.train_mb_size < 1 or self.eval_mb_size < 1:
            raise ValueError(
                f"batch sizes must be at least 1, got train_mb_size={self.train_mb_size}, "
                f"eval_mb_size={self.eval_mb_size}"
            )
        check_range(self, f"[1, {LARGEST_BATCH}]", "train_mb_size", "eval_mb_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(StrategyConfig):
    """Settings of strategies that train adapters by gradients; the defaults are those of MOS on CIFAR-100.

    The recipe (optimizer, learning rate, schedule, weight decay, smoothing, clipping) holds in every phase. What a user
    brings as an object instead is in :mod:`cl_adapters.strategies.recipe`.

    Attributes:
        adapter: adapter type with its options.
        blocks: blocks that get adapters; None: all.
        train_epochs: E, epochs per task.
        lr: learning rate of the adapters, at the begin of the schedule.
        head_lr_factor: the head's learning rate is this times ``lr``.
        optimizer: "sgd", "adam" or "adamw".
        momentum: of SGD; beta_1 of the others, whose beta_2 is 0.999.
        weight_decay: on adapters and head: an L2 factor; of "adamw" the decoupled one.
        schedule: "cosine" to 0, or "constant"; by epoch. A phase that brings a schedule of its own keeps that.
        warm_up: share of a phase's steps in which the learning rate rises linearly, step by step, from near 0 to what
            the schedule says; 0: none.
        label_smoothing: of the cross-entropy: this share of the target lies evenly on the classes that the loss sees.
        clip_norm: longest gradient, by the 2-norm over all that a phase trains; longer ones are shortened to it.
        cached_views: K. Where the first blocks have no adapter in training, run K augmented views of every image up to
            there once and reuse them in all epochs; 0 computes everything anew, with fresh augmentation.
        cache_memory_mb: limit of one such cache in MiB; a larger one, with 0 any, is kept on disk in half precision.
    """

    adapter: AdapterField = dataclasses.field(default_factory=Bottleneck)
    blocks: tuple[int, ...] | None = None
    train_epochs: int = 20
    lr: float = 0.03
    head_lr_factor: float = 0.1
    optimizer: OptimizerName = dataclasses.field(default="sgd", metadata=OMITTED_AT_DEFAULT)
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: ScheduleName = dataclasses.field(default="cosine", metadata=OMITTED_AT_DEFAULT)
    warm_up: float = dataclasses.field(default=0.0, metadata=OMITTED_AT_DEFAULT)
    label_smoothing: float = dataclasses.field(default=0.0, metadata=OMITTED_AT_DEFAULT)
    clip_norm: float | None = dataclasses.field(default=None, metadata=OMITTED_AT_DEFAULT)
    cached_views: int = 0
    cache_memory_mb: float = 2048.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks(self.blocks)
        check_range(self, "[0, 1000]", "cached_views")
        for name, known in (("optimizer", get_args(OptimizerName)), ("schedule", get_args(ScheduleName))):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        check_range(self, "[1, inf)", "train_epochs")
        check_range(self, "(0, inf)", "lr", "clip_norm")
        check_range(self, "[0, 1]", "warm_up")
        check_range(self, "[0, 1)", "label_smoothing")
        check_range(self, "[0, inf)", "cache_memory_mb")
        check_range(self, "[0, inf)", "head_lr_factor", "weight_decay")
        check_range(self, "[0, 1]" if self.optimizer == "sgd" else "[0, 1)", "momentum")


def resolve(
    owner: str,
    cls: type[StrategyConfig],
    config: StrategyConfig | None,
    options: Mapping[str, Any],
    keywords: Sequence[str],
) -> StrategyConfig:
    """The settings of a strategy from a whole configuration, single options, or options on top of one.

    ``owner`` names the strategy in messages, ``keywords`` are all that its constructor takes, fields included.

    Raises:
        ConfigError: an unknown option (with the nearest keyword), a wrong type or range, another strategy's settings.
    """
    for key in options:
        if key not in keywords:
            raise ConfigError(
                f"unknown option {owner}.{key}{suggestion(key, keywords)} Known: {', '.join(sorted(keywords))}"
            )
    if config is None:
        return build(cls, options, owner)
    if not isinstance(config, cls):
        raise ConfigError(f"{owner} takes a {cls.__name__}, got {type(config).__name__}")
    return build(cls, to_plain(config) | dict(options), owner) if options else config
