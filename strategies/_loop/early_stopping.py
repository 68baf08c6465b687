"""Avalanche's EarlyStoppingPlugin in strategies whose tasks have several phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from avalanche.core import BasePlugin
from avalanche.training.plugins import EarlyStoppingPlugin

from cl_adapters.errors import ConfigError


def check_early_stopping(plugins: Sequence[BasePlugin], eval_every: int, peval_mode: str, *, measured: bool) -> None:
    """Check that the metric which the plugin watches is measured often enough.

    Args:
        plugins: of the strategy.
        eval_every: evaluations in between, counted in
        peval_mode: epochs or iterations.
        measured: whether it has an evaluator.

    Raises:
        ConfigError: the plugin would never stop, or stop by numbers that are not new.
    """
    for plugin in plugins:
        if not isinstance(plugin, EarlyStoppingPlugin):
            continue
        if not measured:
            raise ConfigError(f"EarlyStoppingPlugin watches {plugin.metric_name}: give an evaluator that measures it")
        if not 1 <= eval_every <= plugin.patience or peval_mode != plugin.peval_mode:
            raise ConfigError(
                f"EarlyStoppingPlugin counts {plugin.peval_mode}s without a better {plugin.metric_name}, which is "
                f"measured anew by evaluations in between: pass eval_every=1, peval_mode={plugin.peval_mode!r} (got "
                f"eval_every={eval_every}, peval_mode={peval_mode!r}; eval_every may be at most its patience, "
                f"{plugin.patience})"
            )


def begin_early_stopping(strategy: Any) -> None:
    """Let the plugin begin anew in a phase: weights of the phase before do not fit one that has grown since."""
    for plugin in strategy.plugins:
        if isinstance(plugin, EarlyStoppingPlugin):
            plugin.before_training_exp(strategy)
