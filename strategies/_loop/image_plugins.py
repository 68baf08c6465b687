"""Plugins that look at the images of a training batch, which ``cached_views`` puts hidden states in the place of."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from avalanche.evaluation.metrics.mac import EpochMAC, MinibatchMAC
from avalanche.training import plugins

from cl_adapters.errors import ConfigError

READ_IMAGES: tuple[type, ...] = (
    plugins.GenerativeReplayPlugin,
    plugins.GSS_greedyPlugin,
    plugins.LwFPlugin,
    EpochMAC,
    MinibatchMAC,
)
"""Those of Avalanche that read or change ``mb_x`` in training, and are not refused anyway."""
WITH_BATCH = ("before_training_iteration", "before_forward", "after_forward", "before_backward")
"""Callbacks that may read or change it in time for the loss."""


def check_image_plugins(given: Sequence[Any], owner: str) -> None:
    """Check the plugins and metrics of a strategy ``owner`` that has ``cached_views``; warn of those not known.

    Raises:
        ConfigError: one needs images, by name.
    """
    for plugin in given:
        kind = type(plugin)
        if isinstance(plugin, READ_IMAGES):
            raise ConfigError(
                f"{kind.__name__} looks at the images of a batch, and with cached_views {owner} trains on hidden "
                "states in their place: set cached_views=0, or leave it out"
            )
        own = [name for name in WITH_BATCH if not _maker(kind, name).startswith("avalanche.")]
        if own:
            warnings.warn(
                f"with cached_views strategy.mb_x may be hidden states, not images, in {kind.__name__}.{own[0]}: set "
                "cached_views=0 if it looks at images",
                stacklevel=4,
            )


def _maker(kind: type, name: str) -> str:
    """The module of the class that defines a callback."""
    return next(base.__module__ for base in kind.__mro__ if name in vars(base))
