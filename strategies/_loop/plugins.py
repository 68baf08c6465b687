"""Plugins of Avalanche that cannot work here, or have no effect, by name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from avalanche.core import BasePlugin, SupervisedPlugin
from avalanche.training.plugins import GDumbPlugin, GenerativeReplayPlugin, ReplayPlugin

from cl_adapters.errors import ConfigError

REFUSED: dict[type[BasePlugin], str] = {
    GDumbPlugin: "puts an untrained copy in the place of the model before every experience",
    GenerativeReplayPlugin: "labels its images by columns, which here are not class labels",
}
IN_TRAINING = tuple(
    f"{when}_{what}"
    for what in ("training_epoch", "training_iteration", "forward", "backward", "update")
    for when in ("before", "after")
)
"""Callbacks of the training loop, which a strategy that trains nothing never enters."""


def check_plugins(plugins: Sequence[BasePlugin], owner: str, trains: bool) -> None:
    """Refuse plugins that cannot work with the strategy ``owner``; warn of those that will have no effect.

    Raises:
        ConfigError: names the plugin and says why.
    """
    for plugin in plugins:
        name = type(plugin).__name__
        for kind, why in REFUSED.items():
            if isinstance(plugin, kind):
                raise ConfigError(
                    f"{owner} cannot use {name}: it {why}. Take ReplayPlugin, or Avalanche's own strategy of that name "
                    "with cl_adapters.strategies.AdaptedNet"
                )
        if not trains and (isinstance(plugin, ReplayPlugin) or _acts_in_training(plugin)):
            warnings.warn(f"{owner} trains nothing here, so {name} has no effect in training", stacklevel=4)


def _acts_in_training(plugin: BasePlugin) -> bool:
    kind = type(plugin)
    return any(getattr(kind, name, None) is not getattr(SupervisedPlugin, name, None) for name in IN_TRAINING)
