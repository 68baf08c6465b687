"""SEMA: self-expansion with a mixture of modularised adapters (Wang et al., CVPR 2025).

task 0:  adapters in all blocks, head;  then one descriptor per expandable block;  everything but the head is frozen
task t:  scan the images: where every descriptor of an expandable block scores above the threshold, that block gets an
         adapter, a router row and a descriptor, trained at once;  where none expands, only the head is trained
predict: one pass;  delta = sum_k softmax(R p + r)_k A_k(x) at the expandable blocks
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from cl_adapters.adapters.base import AdapterField
from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import AdapterBank, Route
from cl_adapters.config import check_blocks, check_range
from cl_adapters.errors import ConfigError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.heads import kaiming_uniform
from cl_adapters.parts.descriptors import Descriptors, train_descriptors
from cl_adapters.parts.router import ExpandableRouter, router_widths
from cl_adapters.predictors.base import Predictor
from cl_adapters.predictors.mixture import MixtureOfAdapters
from cl_adapters.strategies._loop.adapter_inputs import AdapterInputs
from cl_adapters.strategies.base import AdapterStrategy, Expansion, Returning, strategies
from cl_adapters.strategies.config import LARGEST_BATCH, StrategyConfig, TrainingConfig
from cl_adapters.strategies.phases import Loss, Phase, current_task_loss


def _adapter() -> Bottleneck:
    # the released code configures scale 0.1 and dropout 0.1 but applies neither (sema_components.py:46-53)
    return Bottleneck(scale=1.0, dropout=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SEMAConfig(TrainingConfig):
    """Settings of SEMA; the defaults are those of the released CIFAR-100 configuration.

    Attributes:
        expandable: blocks that may get more adapters; default the last ``last_blocks`` that have any.
        last_blocks: how many that is (blocks 9, 10, 11 of a ViT-B).
        threshold: of the batch mean of |error - mean| / std under the descriptor that knows the batch best.
        descriptor_dim: width inside the descriptors.
        descriptor_epochs: epochs of their training, after that of the adapter.
        descriptor_lr: their learning rate, cosine to 0; always of SGD with ``momentum``.
        buffer: errors that a descriptor remembers.
        scan_mb_size: images per decision.
        scan: "batch" decides batch by batch, as released; "task" once on all images together, so that the decision
            does not depend on how they fall into batches.
        min_batch_share: leave out a last batch smaller than this share of ``scan_mb_size``: a few images alone are
            easily "new". 0 leaves out none, as released.
        max_adapters: most adapters per block; None: no limit but one per block and task.
    """

    adapter: AdapterField = dataclasses.field(default_factory=_adapter)
    train_mb_size: int = 32
    train_epochs: int = 5
    lr: float = 0.005
    head_lr_factor: float = 1.0
    expandable: tuple[int, ...] | None = None
    last_blocks: int = 3
    threshold: float = 2.0
    descriptor_dim: int = 128
    descriptor_epochs: int = 20
    descriptor_lr: float = 0.01
    buffer: int = 500
    scan_mb_size: int = 128
    scan: Literal["batch", "task"] = "batch"
    min_batch_share: float = 0.0
    max_adapters: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_blocks(self.expandable, "expandable")
        check_range(self, "[1, inf)", "last_blocks", "descriptor_epochs", "max_adapters")
        check_range(self, "[1, 65536]", "descriptor_dim")
        check_range(self, f"[1, {LARGEST_BATCH}]", "scan_mb_size", "buffer")
        check_range(self, "(0, inf)", "threshold", "descriptor_lr")
        check_range(self, "[0, 1]", "min_batch_share")


@strategies.register("sema")
class SEMA(AdapterStrategy):
    """A mixture of adapters that grows, block by block, only where the images are unlike all before."""

    Config: ClassVar[type[StrategyConfig]] = SEMAConfig
    summary: ClassVar[str] = "self-expanding mixture of adapters (CVPR 2025)"
    classes_return: ClassVar[Returning] = "taken"
    first_task_adapts: ClassVar[bool] = True
    frozen_after_task: ClassVar[bool] = False  # a new router row changes the mixture of old images too
    explicit_order: ClassVar[bool] = True
    expands: ClassVar[bool] = True
    config: SEMAConfig

    # --- grow ----------------------------------------------------------------------------------------------------

    def new_model(self, backbone: FrozenBackbone) -> AdapterModel:
        """Adapters everywhere; router and descriptors at the expandable blocks."""
        config = self.config
        bank = AdapterBank(backbone, config.adapter, config.blocks)
        model = AdapterModel(backbone, bank)
        chosen = bank.blocks[-config.last_blocks :] if config.expandable is None else config.expandable
        absent = sorted(set(chosen) - set(bank.blocks))
        if absent or not chosen:
            raise ConfigError(f"expandable blocks {absent or '()'} have no adapters; blocks with: {list(bank.blocks)}")
        widths = router_widths(bank, chosen)
        model.parts["mixture"] = ExpandableRouter(widths)
        model.parts["novelty"] = Descriptors(widths, config.descriptor_dim, config.buffer)
        return model

    @property
    def mixture(self) -> ExpandableRouter:
        """The routers."""
        found: ExpandableRouter = self.model.part("mixture", ExpandableRouter)
        return found

    @property
    def descriptors(self) -> Descriptors:
        """The descriptors."""
        found: Descriptors = self.model.part("novelty", Descriptors)
        return found

    def grow(self, task: int) -> None:
        """New head rows; in the first task adapters, router rows and descriptors."""
        model = self.model
        self.grow_head(kaiming_uniform)
        if task == 0:
            model.bank.add_slot(self.fresh_adapter())
            self._route_slot(0, self.mixture.blocks)

    def _expand(self, block: int) -> int:
        """One more adapter at a block; its slot."""
        bank = self.model.bank
        slot = int(bank.add_slot(bank.fresh(self.generator(f"adapter {block}", self.task), blocks=[block])))
        self._route_slot(slot, [block])
        return slot

    def _route_slot(self, slot: int, blocks: Sequence[int]) -> None:
        """Router rows and descriptors of a new slot."""
        self._rows = [
            row for b in blocks for row in self.mixture.grow(b, slot, self.generator(f"router {b}", self.task))
        ]
        for b in blocks:
            self.descriptors.grow(b, slot, self.generator(f"descriptor {b}", self.task))

    # --- train ---------------------------------------------------------------------------------------------------

    def phases(self, task: int) -> Iterator[Phase]:
        """Scan and train by turns; the scan goes on while phases run."""
        if task == 0:
            yield from self._learn(0, self.mixture.blocks, start=min(self.model.bank.blocks))
            return
        expanded: set[int] = set()
        scan, again = 0, True
        while again:
            again = False
            for batch, scores in enumerate(self._scan()):
                block = self._novel(scores, expanded)
                if block is None:
                    continue
                slot = self._expand(block)
                expanded.add(block)
                found = {"score": scores[block], "threshold": self.config.threshold, "scan": scan, "batch": batch}
                self.expansions.append(Expansion(task=task, block=block, slot=slot, **found))  # type: ignore[arg-type]
                yield from self._learn(slot, [block], start=block)
                again = True
            scan += 1
        if not expanded:
            start = self.model.backbone.depth if self.config.cached_views else None
            loss, epochs = self._loss(), self.config.train_epochs
            yield Phase(name="head", epochs=epochs, groups=(self.head_group(),), loss=loss, start=start)

    def routes(self) -> Mapping[str, Route]:
        """The mixture at the expandable blocks, the first adapter elsewhere."""
        return self.mixture.routes(self.model.bank)

    def _learn(self, slot: int, blocks: Sequence[int], start: int) -> Iterator[Phase]:
        """Train one slot with its router rows and the head, then its descriptors; freeze all of them."""
        yield self.adapter_phase([*self.model.bank.slot_parameters(slot), *self._rows], self._loss(), start)
        self.model.bank.freeze(slot)
        self.mixture.freeze()
        self._train_descriptors([(block, slot) for block in blocks])
        self.descriptors.freeze()

    def _loss(self) -> Loss:
        return partial(current_task_loss, known=self.known, returning=self.returning)

    # --- detect --------------------------------------------------------------------------------------------------

    def _scan(self) -> Iterator[dict[int, float]]:
        """Scores of the expandable blocks, batch by batch over the task's images, under the model of the moment."""
        config = self.config
        smallest = config.min_batch_share * config.scan_mb_size
        seen = self._inputs(self.mixture.blocks).read(self.new_pass(config.scan_mb_size, min(self.mixture.blocks)))
        batches: Iterable[dict[int, Tensor]] = (p for p in seen if len(next(iter(p.values()))) >= smallest)
        if config.scan == "task":
            parts = list(batches)
            batches = [{block: torch.cat([p[block] for p in parts]) for block in self.mixture.blocks}]
        for p in batches:
            yield {block: self.descriptors.score(block, p_BD) for block, p_BD in p.items()}

    def _novel(self, scores: Mapping[int, float], expanded: set[int]) -> int | None:
        """The first block, from the input, that may expand and finds the batch new."""
        limit = self.config.max_adapters
        for block in self.mixture.blocks:
            room = limit is None or len(self.mixture.slots(block)) < limit
            if block not in expanded and room and scores[block] > self.config.threshold:
                return block
        return None

    def _train_descriptors(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Train the descriptors of these (block, slot)."""
        config = self.config
        blocks = tuple(block for block, _ in pairs)
        passes = self._inputs(blocks).passes(
            self.activation_cache(),
            lambda: self.new_pass(config.train_mb_size, min(blocks)),
            batch=config.train_mb_size,
            draw=self.next_order,
            read=config.eval_mb_size,
        )
        trained = [p for block, slot in pairs for p in self.descriptors.descriptor(block, slot).parameters()]
        self.trainable_parameters = max(self.trainable_parameters, sum(p.numel() for p in trained))
        train_descriptors(
            self.descriptors,
            pairs,
            passes,
            epochs=config.descriptor_epochs,
            lr=config.descriptor_lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            report=lambda epoch, loss: self.report("descriptor", epoch + 1, config.descriptor_epochs),
        )

    def _inputs(self, blocks: Sequence[int]) -> AdapterInputs:
        """What the adapters at these blocks see, in a pass that ends behind them where activations are cached."""
        return AdapterInputs(self.model, self.routes, blocks, whole=not self.config.cached_views)

    # --- consolidate, predict ------------------------------------------------------------------------------------

    def consolidate(self, task: int) -> None:
        """Nothing is left to do: what was trained is frozen already."""
        self._rows = []

    def predictor(self, task: int, training: bool) -> Predictor:
        """The mixture and the linear head; no descriptor runs."""
        return MixtureOfAdapters()
