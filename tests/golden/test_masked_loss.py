"""Old head rows in a real phase of MOS: their gradient is exactly 0, and a step moves them by lr * wd * w only.

Origin: MOS masks the logits of finished tasks with minus infinity, and torch.optim.SGD applies weight decay to the
whole matrix. The head's learning rate is a tenth of lr0 = 0.03, weight decay 5e-4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from avalanche.core import SupervisedPlugin
from torch import Tensor

from cl_adapters.strategies.mos import MOS


class Watch(SupervisedPlugin):
    """The head's gradients before the step, and its rows before and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.gradients: list[tuple[Tensor, Tensor]] = []
        self.before: list[tuple[Tensor, Tensor]] = []
        self.after: list[tuple[Tensor, Tensor]] = []

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        head = strategy.model.head
        self.gradients.append((head.weight.grad.clone(), head.bias.grad.clone()))
        self.before.append((head.weight.detach().clone(), head.bias.detach().clone()))

    def after_update(self, strategy: Any, **kwargs: Any) -> None:
        head = strategy.model.head
        self.after.append((head.weight.detach().clone(), head.bias.detach().clone()))


def test_old_rows_get_no_gradient_and_only_decay(make_mos: Callable[..., MOS], two_tasks: list[Any]) -> None:
    strategy = make_mos(alignment={"epochs": 3})
    strategy.train(two_tasks[0])
    watch = Watch()
    strategy.plugins.append(watch)
    strategy.train(two_tasks[1])
    known = 2
    assert len(watch.gradients) == 6
    for weight, bias in watch.gradients:
        assert not weight[:known].any()
        assert not bias[:known].any()
        assert (weight[known:] != 0).any(1).all(), "every row of the task in training learns"
    for old, new in zip(watch.before[0], watch.after[0], strict=True):  # the first step: no momentum yet
        wanted = old[:known].double() * (1 - 0.003 * 5e-4)
        assert (new[:known].double() - wanted).abs().max() < 1e-9 + 1e-7 * float(old[:known].abs().max())
        assert (new[known:] - old[known:]).abs().max() > 1e-5
    assert float(watch.before[0][0][:known].abs().max()) > 1e-3, "rows of a size that decays visibly"
    # with momentum the later steps still move the old rows by decay alone: 5 steps of at most lr wd w / (1 - 0.9)
    drift = (watch.after[-1][0][:known] - watch.before[0][0][:known]).abs()
    assert (drift <= 6 * 10 * 0.003 * 5e-4 * watch.before[0][0][:known].abs() + 1e-8).all()
