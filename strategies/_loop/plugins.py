"""Plugins of Avalanche that cannot work here, or have no effect, by name."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from avalanche.core import BasePlugin, SupervisedPlugin
from avalanche.training import plugins

from cl_adapters.errors import ConfigError

_RESETS = "puts an untrained model in the place of the one that goes on"
_OWN = "brings a loss, head or model of its own, in the place of the method's"
_EARLIER = "keeps numbers of the parameters that the model has before it grows for its first task"
_TRACES = "traces the model's layers, which adapters do not allow"

REFUSED: dict[type[BasePlugin], str] = {
    plugins.GDumbPlugin: _RESETS,
    plugins.FromScratchTrainingPlugin: _RESETS,
    plugins.LFLPlugin: _OWN,
    plugins.CoPEPlugin: _OWN,
    plugins.CWRStarPlugin: _OWN,
    plugins.BiCPlugin: _OWN,
    plugins.FeatureDistillationPlugin: _OWN,
    plugins.CurrentDataNCMUpdate: _OWN,
    plugins.MemoryNCMUpdate: _OWN,
    plugins.NCMOracle: _OWN,
    plugins.CurrentDataFeCAMUpdate: _OWN,
    plugins.MemoryFeCAMUpdate: _OWN,
    plugins.FeCAMOracle: _OWN,
    plugins.TrainGeneratorAfterExpPlugin: _OWN,
    plugins.RWalkPlugin: _EARLIER,
    plugins.RARPlugin: _TRACES,
}
PROTECTING: tuple[type[BasePlugin], ...] = (
    plugins.EWCPlugin,
    plugins.MASPlugin,
    plugins.SynapticIntelligencePlugin,
    plugins.LwFPlugin,
    plugins.AGEMPlugin,
    plugins.GEMPlugin,
    plugins.MIRPlugin,
    plugins.GSS_greedyPlugin,
    plugins.GenerativeReplayPlugin,
)
"""What protects earlier tasks while a later one is trained."""
READ_TASK_LABELS = (plugins.LwFPlugin, plugins.GSS_greedyPlugin, plugins.GenerativeReplayPlugin)
"""What fails in the middle of training where samples have none, in Avalanche's own strategies too."""
IN_TRAINING = tuple(
    f"{when}_{what}"
    for what in ("training_epoch", "training_iteration", "forward", "backward", "update")
    for when in ("before", "after")
)
"""Callbacks of the training loop, which a strategy that trains nothing never enters."""


def check_plugins(
    given: Sequence[BasePlugin], owner: str, device: torch.device, *, trains: bool, later: bool, expands: bool
) -> None:
    """Refuse plugins that cannot work with the strategy ``owner``; warn of those that will have no effect.

    Args:
        given: the plugins.
        owner: the strategy's name.
        device: where it trains.
        trains: whether it trains anything by gradients.
        later: whether it does so after the first task too.
        expands: whether it makes adapters in the middle of a task.

    Raises:
        ConfigError: names the plugin and says why.
    """
    idle = "in the first task only" if trains else "nothing here"
    instead = "Take ReplayPlugin; or train" if later else "Train"
    for plugin in given:
        name = type(plugin).__name__
        integrates = isinstance(plugin, plugins.SynapticIntelligencePlugin)
        why = next((why for kind, why in REFUSED.items() if isinstance(plugin, kind)), None)
        if isinstance(plugin, PROTECTING) and not later:
            why = f"protects earlier tasks in the training of later ones, and {owner} trains {idle}"
        elif integrates and expands:
            why = f"keeps numbers of the parameters that are there when a task begins, and {owner} adds some later"
        if why is not None:
            raise ConfigError(
                f"{owner} cannot use {name}: it {why}. {instead} cl_adapters.strategies.AdaptedNet with Avalanche's "
                "own strategy of that name"
            )
        if integrates and device.type == "cpu":
            warnings.warn(
                f"Avalanche's {name} has no effect on a CPU: it compares the parameters with themselves, since what it "
                "keeps of them shares their memory there",
                stacklevel=4,
            )
        if (not later and isinstance(plugin, plugins.ReplayPlugin)) or (not trains and _acts_in_training(plugin)):
            warnings.warn(f"{owner} trains {idle}, so {name} has no effect in training", stacklevel=4)


def check_task_labels(given: Sequence[BasePlugin], owner: str, dataset: Any) -> None:
    """Check that a data set has the task labels that plugins of the strategy ``owner`` read.

    Raises:
        ConfigError: names the plugin.
    """
    for plugin in given:
        if isinstance(plugin, READ_TASK_LABELS) and not hasattr(dataset, "targets_task_labels"):
            raise ConfigError(
                f"{owner} cannot use {type(plugin).__name__} on this stream: it reads task labels, and the samples "
                "have none. Take nc_benchmark(..., task_labels=False), which gives them 0"
            )


def _acts_in_training(plugin: BasePlugin) -> bool:
    kind = type(plugin)
    return any(getattr(kind, name, None) is not getattr(SupervisedPlugin, name, None) for name in IN_TRAINING)
