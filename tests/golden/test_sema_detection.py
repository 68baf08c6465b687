"""SEMA's expansion protocol on scripted scores, and its phases.

Protocol: models/sema.py:59-121 and sema_block.py:112-171 of the released code. In forward order the first block that
has not expanded in this task and scores the batch above the threshold expands; it is trained at once and the scan goes
on with the next batch; a pass that added anything is followed by another; without any only the head is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from cl_adapters.strategies import SEMA
from cl_adapters.strategies.phases import Phase

BLOCKS = (9, 10, 11)
Script = Sequence[Sequence[Mapping[int, float]]]
"""Scores above 0 by block, batch by batch, pass by pass; later passes find nothing."""


@pytest.fixture
def sema(tiny_vit: Callable[..., nn.Module]) -> Callable[..., Any]:
    """A SEMA strategy in its second task, with the blocks of the paper; nothing was trained."""

    def make(**options: Any) -> Any:
        vit = tiny_vit(width=8, heads=2, img_size=16, depth=12)
        strategy = SEMA(model=vit, evaluator=None, descriptor_dim=2, **options)
        strategy.model.add_task([0, 1])
        strategy.grow(0)
        strategy.model.add_task([2])
        strategy.grow(1)
        return strategy

    return make


def play(strategy: Any, script: Script, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """Run the protocol of one task; name and first trained block of every phase."""
    passes = iter(script)

    def scan() -> Iterator[dict[int, float]]:
        for batch in next(passes, [{}, {}]):
            yield dict.fromkeys(BLOCKS, 0.0) | dict(batch)

    monkeypatch.setattr(strategy, "_scan", scan)
    monkeypatch.setattr(strategy, "_train_descriptors", lambda pairs: None)
    phases: list[Phase] = list(strategy.phases(1))
    return [(phase.name, phase.start) for phase in phases]


SCRIPTS: dict[str, tuple[Script, list[tuple[int, int, int]]]] = {
    "none": ([[{}, {}, {}]], []),
    "at the threshold is not above it": ([[{9: 2.0, 10: 2.0, 11: 2.0}]], []),
    "only 10": ([[{}, {10: 3.0}, {}]], [(10, 0, 1)]),
    "9, then 11 on the next batch": ([[{9: 3.0, 11: 3.0}, {9: 3.0, 11: 3.0}]], [(9, 0, 0), (11, 0, 1)]),
    "10, then 9 on a later batch": ([[{10: 3.0}, {}, {9: 3.0}]], [(10, 0, 0), (9, 0, 2)]),
    "once per task": ([[{10: 9.0}, {10: 9.0}], [{10: 9.0}]], [(10, 0, 0)]),
    "in the pass after": ([[{9: 3.0}], [{11: 3.0}], [{10: 3.0}]], [(9, 0, 0), (11, 1, 0), (10, 2, 0)]),
    "a pass without any ends it": ([[{9: 3.0}], [{}], [{10: 3.0}]], [(9, 0, 0)]),
}


@pytest.mark.parametrize("case", SCRIPTS)
def test_scripted_scores(sema: Any, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, expected = SCRIPTS[case]
    strategy = sema()
    before = strategy.model.num_slots
    phases = play(strategy, script, monkeypatch)
    found = [(e.block, e.scan, e.batch) for e in strategy.expansions]
    assert found == expected
    assert phases == [("adapter", block) for block, *_ in expected] or (phases == [("head", None)] and not expected)
    assert [e.slot for e in strategy.expansions] == list(range(before, before + len(expected)))
    for e in strategy.expansions:
        assert (e.task, e.threshold) == (1, 2.0)
        assert e.score > 2
        keys = {key.rpartition(".")[0] for key in strategy.model.bank.export(e.slot)}
        assert keys == {f"blocks.{e.block}"}, "the adapter is at that block alone"
    assert {b: strategy.mixture.slots(b) for b in BLOCKS} == {
        b: (0, *[e.slot for e in strategy.expansions if e.block == b]) for b in BLOCKS
    }


def test_what_is_trained(sema: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At an expansion the new adapter, its router row and the whole head; nothing else, then nothing at all."""
    strategy = sema()
    strategy.model.bank.freeze(0)
    strategy.mixture.freeze()
    batches = iter([[{9: 0.0, 10: 3.0, 11: 0.0}]])
    monkeypatch.setattr(strategy, "_scan", lambda: iter(next(batches, [dict.fromkeys(BLOCKS, 0.0)])))
    monkeypatch.setattr(strategy, "_train_descriptors", lambda pairs: None)
    phases = strategy.phases(1)
    phase = next(phases)
    trained = {id(p) for group in phase.groups for p in group.params}
    adapter = {id(p) for p in strategy.model.bank.slot_parameters(1)}
    row = {id(p) for p in strategy.mixture.at["10"]["1"].parameters()}
    head = {id(p) for p in strategy.model.head.parameters()}
    assert trained == adapter | row | head
    live = {id(p) for p in strategy.model.parameters() if p.requires_grad}
    descriptors = {id(p) for p in strategy.descriptors.parameters()}
    assert live - descriptors == trained
    assert list(phases) == []
    assert {id(p) for p in strategy.model.bank.parameters() if p.requires_grad} == set()
    assert not any(p.requires_grad for p in [*strategy.mixture.parameters(), *strategy.descriptors.parameters()])


def test_cap_on_adapters_per_block(sema: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    strategy = sema(max_adapters=1)
    assert play(strategy, [[{9: 9.0, 10: 9.0, 11: 9.0}]], monkeypatch) == [("head", None)]
    strategy = sema(max_adapters=2)
    assert len(play(strategy, [[{9: 9.0}, {9: 9.0, 10: 9.0}]], monkeypatch)) == 2


@pytest.mark.parametrize(("share", "batches"), [(0.0, [4, 4, 1]), (0.25, [4, 4, 1]), (0.5, [4, 4])])
def test_small_last_batches_may_be_left_out(
    sema: Any, share: float, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = sema(scan_mb_size=4, min_batch_share=share)
    assert scored(strategy, monkeypatch) == batches


def test_the_whole_task_may_be_one_decision(sema: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scored(sema(scan_mb_size=4, scan="task"), monkeypatch) == [9]


def scored(strategy: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are scored in one pass over nine images."""
    images = torch.randn(9, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    strategy.adapted_dataset = [(image, 2) for image in images]
    strategy._images = strategy._own_images = None
    sizes: list[int] = []

    def score(block: int, p_BD: torch.Tensor) -> float:
        assert p_BD.shape[1:] == (8,)
        if block == BLOCKS[0]:
            sizes.append(len(p_BD))
        return 0.0

    monkeypatch.setattr(strategy.descriptors, "score", score)
    assert all(scores == dict.fromkeys(BLOCKS, 0.0) for scores in strategy._scan())
    return sizes


def test_scores_come_from_the_input_of_each_block(sema: Any) -> None:
    """The pooled inputs that descriptors see are those of the adapters: the residual stream after attention."""
    strategy = sema()
    encoder: Any = strategy.model.backbone.encoder
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    seen: dict[int, torch.Tensor] = {}
    handles = [
        encoder.blocks[b].norm2.register_forward_pre_hook(lambda m, args, b=b: seen.update({b: args[0].mean(1)}))
        for b in BLOCKS
    ]
    (found,) = strategy._inputs(BLOCKS).read([(x, None)])
    for handle in handles:
        handle.remove()
    assert found.keys() == seen.keys()
    assert all(torch.equal(found[b], seen[b]) for b in BLOCKS)
