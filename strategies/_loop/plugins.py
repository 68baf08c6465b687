"""Plugins of Avalanche that cannot work here, or have no effect, by name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from avalanche.core import BasePlugin, SupervisedPlugin
from avalanche.training import plugins

from cl_adapters.errors import ConfigError

_RESETS = "puts an untrained model in the place of the one that goes on"
_ASKS = "asks strategy.model(x) for logits by class label with gradients, which here are columns without any"
_OWN = "brings a loss, head or model of its own, in the place of the method's"

REFUSED: dict[type[BasePlugin], str] = {
    plugins.GDumbPlugin: _RESETS,
    plugins.FromScratchTrainingPlugin: _RESETS,
    plugins.EWCPlugin: _ASKS,
    plugins.MASPlugin: _ASKS,
    plugins.RWalkPlugin: _ASKS,
    plugins.AGEMPlugin: _ASKS,
    plugins.GEMPlugin: _ASKS,
    plugins.GSS_greedyPlugin: _ASKS,
    plugins.LwFPlugin: _ASKS,
    plugins.MIRPlugin: _ASKS,
    plugins.GenerativeReplayPlugin: _ASKS,
    plugins.LFLPlugin: _OWN,
    plugins.CoPEPlugin: _OWN,
    plugins.CWRStarPlugin: _OWN,
    plugins.BiCPlugin: _OWN,
}
IN_TRAINING = tuple(
    f"{when}_{what}"
    for what in ("training_epoch", "training_iteration", "forward", "backward", "update")
    for when in ("before", "after")
)
"""Callbacks of the training loop, which a strategy that trains nothing never enters."""


def check_plugins(given: Sequence[BasePlugin], owner: str, trains: bool) -> None:
    """Refuse plugins that cannot work with the strategy ``owner``; warn of those that will have no effect.

    Raises:
        ConfigError: names the plugin and says why.
    """
    for plugin in given:
        name = type(plugin).__name__
        for kind, why in REFUSED.items():
            if isinstance(plugin, kind):
                raise ConfigError(
                    f"{owner} cannot use {name}: it {why}. Take ReplayPlugin; or train "
                    "cl_adapters.strategies.AdaptedNet with Avalanche's own strategy of that name"
                )
        if not trains and (isinstance(plugin, plugins.ReplayPlugin) or _acts_in_training(plugin)):
            warnings.warn(f"{owner} trains nothing here, so {name} has no effect in training", stacklevel=4)


def _acts_in_training(plugin: BasePlugin) -> bool:
    kind = type(plugin)
    return any(getattr(kind, name, None) is not getattr(SupervisedPlugin, name, None) for name in IN_TRAINING)
