"""InstructMethod: what every method of continual instruction tuning shares.

A method answers four questions: which adapters are new in a task and trained, who uses which adapter in training, what
is added to the loss, and who uses which adapter afterwards.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from cl_adapters._seeding import generator
from cl_adapters.adapters.base import AdapterField
from cl_adapters.adapters.lora import LoRA
from cl_adapters.bank.routes import Route, Routes
from cl_adapters.config import check_blocks, check_range
from cl_adapters.errors import ClAdaptersError, TrainingDiverged
from cl_adapters.language.model import LanguageModel
from cl_adapters.language.tokens import joined
from cl_adapters.parts.keys import KeysConfig
from cl_adapters.registry import Registry
from cl_adapters.strategies._loop.order import length_batches
from cl_adapters.strategies.config import LARGEST_BATCH
from cl_adapters.strategies.instruct.tasks import InstructTask

WINDOW = 16
"""Batches whose examples are sorted by length together."""


def _lora() -> LoRA:
    return LoRA(rank=8, targets=("query", "value"), scale=2.0)


@dataclass(frozen=True, kw_only=True)
class InstructConfig:
    """Settings of every method.

    Attributes:
        adapter: adapter type with its options.
        blocks: blocks that get adapters; None: all.
        epochs: passes over the examples of a task.
        batch: examples per step.
        optimizer: "adamw" or "sgd".
        lr: learning rate.
        schedule: of the learning rate within a task, "cosine" to 0 or "constant".
        momentum: of SGD.
        weight_decay: on the adapters.
        max_norm: the gradient is cut to this length; None: never.
        keys: what is kept of a task's prompts, to find its adapter for a prompt.
        max_new_tokens: of a generated answer.
        eval_batch: prompts at a time in evaluation.
    """

    adapter: AdapterField = field(default_factory=_lora)
    blocks: tuple[int, ...] | None = None
    epochs: int = 3
    batch: int = 8
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_norm: float | None = 1.0
    keys: KeysConfig = field(default_factory=lambda: KeysConfig(kind="centroids"))
    max_new_tokens: int = 16
    eval_batch: int = 16

    def __post_init__(self) -> None:
        check_blocks(self.blocks)
        check_range(self, "[1, inf)", "epochs", "max_new_tokens")
        check_range(self, f"[1, {LARGEST_BATCH}]", "batch", "eval_batch")
        check_range(self, "(0, inf)", "lr", "max_norm")
        check_range(self, "[0, inf)", "weight_decay")
        check_range(self, "[0, 1]", "momentum")


class InstructMethod(ABC):
    """Base of the methods. All that one learns is in the language model's :class:`AdapterModel`.

    Args:
        language: the model, new or after some tasks of the same method.
        config: settings.
        seed: of everything random: initial values, order of the examples, dropout, keys.

    Attributes:
        trainable_parameters: at once, the most in the newest task.
        losses: mean loss on the answers' tokens in each epoch of the newest task.
    """

    Config: ClassVar[type[InstructConfig]] = InstructConfig
    summary: ClassVar[str] = ""

    def __init__(self, language: LanguageModel, config: InstructConfig, seed: int = 0) -> None:
        self.language = language
        self.config = config
        self.seed = seed
        self.trainable_parameters = 0
        self.losses: list[float] = []
        language.bank  # noqa: B018  # a model without adapters is refused here

    # --- the four questions --------------------------------------------------------------------------------------

    @abstractmethod
    def grow(self, name: str, task: int) -> int:
        """Add task number ``task`` (0-based) to the model, and return the adapter that is trained in it."""

    def training_routes(self, rows: int) -> Routes:
        """The adapters of ``rows`` prompts in training; default the newest."""
        return Route.single(self.language.model.num_slots - 1)

    def penalty(self) -> Tensor | None:
        """What is added to the loss; None: nothing."""
        return None

    @abstractmethod
    def routes(self, prompts: Sequence[str]) -> Routes:
        """The adapters that answer prompts of any task."""

    # --- the shared loop -----------------------------------------------------------------------------------------

    def learn(self, task: InstructTask, progress: Callable[[str, int, int], None] | None = None) -> None:
        """Learn the next task.

        Args:
            task: with a name of its own.
            progress: called as ("train", steps done, steps in all).

        Raises:
            DataError: a task of that name was learned, or texts that cannot be used.
            TrainingDiverged: the loss is not a finite number.
        """
        number = len(self.language.tasks)
        pairs = self.language.tokens.pairs(
            [example.prompt for example in task.train], [example.answer for example in task.train], end=True
        )
        slot = self.grow(task.name, number)
        for other in range(self.language.model.num_slots):
            self.language.bank.freeze(other)
        parameters = self.language.bank.slot_parameters(slot)
        for parameter in parameters:
            parameter.requires_grad_(True)
        self.trainable_parameters = sum(parameter.numel() for parameter in parameters)
        self._train(pairs, parameters, number, progress)
        self.language.finish_task([example.prompt for example in task.train], self.generator("keys", number))

    def generator(self, purpose: str, task: int, *more: int) -> torch.Generator:
        """A fresh CPU generator for one purpose in one task."""
        return generator(self.seed, f"instruct {purpose}", task, *more)

    def _train(
        self,
        pairs: list[tuple[list[int], list[int]]],
        parameters: list[nn.Parameter],
        task: int,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        config = self.config
        optimizer = _optimizer(parameters, config)
        lengths_N = torch.tensor([len(prompt) + len(answer) for prompt, answer in pairs])
        steps, done = config.epochs * math.ceil(len(pairs) / config.batch), 0
        dropout_generator = generator(self.seed, "instruct dropout", task, device=self.language.device)
        self.losses = []
        for epoch in range(config.epochs):
            total, tokens = 0.0, 0
            order = self.generator("order", task, epoch)
            for rows_B in length_batches(lengths_N, config.batch, order, window=WINDOW):
                for group in optimizer.param_groups:
                    group["lr"] = _rate(config, done / steps)
                log_p_BN, counted_BN = self.language.answer_log_p(
                    joined([pairs[row] for row in rows_B.tolist()]),
                    self.training_routes(len(rows_B)),
                    dropout_generator,
                )
                self._step(-log_p_BN.sum() / counted_BN.sum(), optimizer, parameters, task, epoch)
                total, tokens, done = total - float(log_p_BN.detach().sum()), tokens + int(counted_BN.sum()), done + 1
                if progress is not None:
                    progress("train", done, steps)
            self.losses.append(total / tokens)

    def _step(
        self, loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], task: int, epoch: int
    ) -> None:
        penalty = self.penalty()
        loss = loss if penalty is None else loss + penalty
        if not bool(loss.isfinite()):
            raise TrainingDiverged(
                f"the loss is {loss.item()} in epoch {epoch + 1} of task {task + 1}: choose a smaller lr than "
                f"{self.config.lr}"
            )
        optimizer.zero_grad()
        loss.backward()
        if self.config.max_norm is not None:
            nn.utils.clip_grad_norm_(parameters, self.config.max_norm)
        optimizer.step()


instruct_methods: Registry[type[InstructMethod]] = Registry(
    "instruction method", "cl_adapters.strategies.instruct", group="cl_adapters.strategies.instruct"
)


def check_learned(language: LanguageModel) -> None:
    """Check that there is something to answer with.

    Raises:
        ClAdaptersError: no task was learned yet.
    """
    if not language.tasks:
        raise ClAdaptersError("no task was learned yet: nothing is known of any prompt")


def _optimizer(parameters: list[nn.Parameter], config: InstructConfig) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)


def _rate(config: InstructConfig, done: float) -> float:
    """Learning rate after that share of the steps."""
    return config.lr if config.schedule == "constant" else config.lr * (1 + math.cos(math.pi * done)) / 2
