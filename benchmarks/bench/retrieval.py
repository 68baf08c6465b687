"""Retrieval without training on real digits: accuracy, routing, passes; and what is refused of classes never seen.

    python -m cl_adapters.benchmarks.bench.retrieval

Trains MOS on all tasks but the last, whose classes are then unseen. Each predictor answers the test images of
the known classes; with a threshold at the target rates it also says which images are of none of them.

Accuracy tells of retrieval only where adapters change answers. So the table begins with what no retrieval gives, the
bare backbone and the wrong adapter for every image, and says how far adapters move the features. Merging holds MOS's
adapters near the first one: with few or short steps that one stays near the identity, and all rows agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.utils.data import DataLoader

from cl_adapters.adapters.bottleneck import Bottleneck
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.bank.bank import Route
from cl_adapters.benchmarks.base import BenchmarkData
from cl_adapters.benchmarks.bench._command import command_of, one_of
from cl_adapters.benchmarks.cli.options import parse_settings
from cl_adapters.benchmarks.spec import parse_benchmark
from cl_adapters.benchmarks.streams.avalanche import to_avalanche
from cl_adapters.benchmarks.streams.datasets import as_dataset, task_indices
from cl_adapters.benchmarks.streams.prepared import prepare
from cl_adapters.features import LazyFeatures
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.state import ModelState
from cl_adapters.openset import OpenSet, calibrate, open_set
from cl_adapters.parts.keys import CLASS_KEYS, Keys, KeysConfig
from cl_adapters.predictors.base import Prediction, Predictor
from cl_adapters.predictors.fixed import Fixed
from cl_adapters.predictors.knn_vote import KNNVote
from cl_adapters.predictors.nearest_key import NearestKey
from cl_adapters.predictors.nearest_prototype import NearestPrototype
from cl_adapters.predictors.self_refine import SelfRefine
from cl_adapters.predictors.soft_top_k import SoftTopK
from cl_adapters.strategies.mos import MOS

KEYS = ("prototypes", "centroids", "features")

PREDICTORS: dict[str, Predictor] = {
    "self-refine, from adapter 0 (MOS)": SelfRefine(),
    "nearest prototype under adapter 0": NearestPrototype(),
    "nearest key": NearestKey(),
    "k-NN vote": KNNVote(),
    "soft top-k": SoftTopK(),
    "self-refine, from the keys": SelfRefine(start="keys"),
}


class WrongAdapter(Predictor):
    """The adapter of another task than the nearest key's: what retrieval has to be better than."""

    def predict(self, model: ModelState, features: LazyFeatures) -> Prediction:
        """Linear logits under the next adapter."""
        wrong_B = (NearestKey().predict(model, features).adapter + 1) % model.num_slots
        return Prediction(model.head(features(features.rows, wrong_B)), wrong_B, features.passes_B)


CONTROLS: dict[str, Predictor] = {
    "control: no adapter": Fixed(),
    "control: the wrong adapter": WrongAdapter(),
}


def main(
    benchmark: str = "digits",
    backbone: str = "vit_glyph_tiny",
    weights: Annotated[Path | None, typer.Option(help="Local weights of the backbone.")] = None,
    img_size: int | None = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Options of the benchmark.")
    ] = None,
    seed: int = 0,
    epochs: int = 8,
    lr: float = 0.1,
    scale: Annotated[float, typer.Option(help="Of the adapters' output.")] = 0.1,
    momentum: Annotated[float, typer.Option(help="Of the merging; 0 lets adapters go their own ways.")] = 0.1,
    keys: Annotated[str, typer.Option(callback=one_of(KEYS), help="prototypes, centroids or features")] = "features",
    late: Annotated[
        int | None, typer.Option(help="Blocks with adapters in the second model; default a quarter.")
    ] = None,
    rates: Annotated[list[float] | None, typer.Option(help="Of the thresholds; default 0.05 0.1.")] = None,
) -> None:
    """Train twice (adapters in all blocks, and in the late ones only) and print a table for each."""
    torch.set_num_threads(1)
    data = parse_benchmark(benchmark, parse_settings(settings or ()))[1].load(seed)

    def load() -> FrozenBackbone:
        """A backbone of its own for every model: hooks stay where they are attached."""
        return FrozenBackbone.load(backbone, weights=weights, img_size=img_size)

    depth = load().depth
    chosen = {"keys": KeysConfig(kind=keys), "adapter": Bottleneck(scale=scale)}  # type: ignore[arg-type]
    chosen |= {"seed": seed, "train_epochs": epochs, "lr": lr, "adapter_momentum": momentum}
    for blocks in (None, tuple(range(depth - (late or max(1, depth // 4)), depth))):
        where = "all blocks" if blocks is None else f"the last {len(blocks)} of {depth} blocks"
        print(f"\nMOS on {len(data.tasks) - 1} tasks of {benchmark}, adapters in {where}, keys: {keys}")
        table(trained(load(), data, chosen | {"blocks": blocks}), data, rates or [0.05, 0.1])


def trained(backbone: FrozenBackbone, data: BenchmarkData, options: Mapping[str, Any]) -> AdapterModel:
    """MOS on all tasks but the last."""
    strategy = MOS(model=backbone, evaluator=None, **options)
    for experience in to_avalanche(*prepare(data, backbone)).train_stream[: len(data.tasks) - 1]:
        strategy.train(experience)
    model: AdapterModel = strategy.model
    return model


def table(model: AdapterModel, data: BenchmarkData, rates: list[float]) -> None:
    """Print what each predictor finds, then what thresholds refuse."""
    known = list(batches(model, data, data.tasks[:-1]))
    unseen = [x for x, _ in batches(model, data, data.tasks[-1:])]
    print(f"{'':36}{'accuracy %':>12}{'routing %':>12}{'passes':>9}")
    for name, predictor in (CONTROLS | PREDICTORS).items():
        found = open_set(model, known, predictor=predictor)
        routing = "" if found.routing is None else f"{100 * found.routing:.1f}"
        print(f"{name:36}{100 * found.accuracy:12.1f}{routing:>12}{found.passes:9.2f}")
    print(f"adapters move the features by {100 * shift(model, known[0][0]):.2g} % of their length")
    free = open_set(model, known, unseen, predictor=NearestKey())
    keys = model.part(CLASS_KEYS, Keys)
    asked = sum(len(y) for _, y in known)
    print(f"AUROC, {asked} known against {sum(map(len, unseen))} of classes never seen: {free.auroc:.3f}")
    print(f"threshold from {len(keys.held_out_HD)} held-back features:   coverage %   false accepts %   accuracy %")
    for rate in rates:
        for target in ("false_reject", "false_accept"):
            reject, accept = (rate, None) if target == "false_reject" else (None, rate)
            calibrate(model, false_reject=reject, false_accept=accept)
            show(f"  {target.replace('_', ' ')} at {100 * rate:g} %", open_set(model, known, unseen))
    del model.parts["abstention"]


def shift(model: AdapterModel, x: Tensor) -> float:
    """Mean over the adapters of |f - f_bare| / |f_bare|."""
    with torch.inference_mode():
        bare = model.features(x, None)
        moved = [(model.features(x, Route.single(slot)) - bare).norm() for slot in range(model.num_slots)]
        return float(torch.stack(moved).mean() / bare.norm())


def show(name: str, found: OpenSet) -> None:
    """One line of the second table."""
    assert found.false_accept is not None
    print(f"{name:38}{100 * found.coverage:14.1f}{100 * found.false_accept:18.1f}{100 * found.accuracy:13.1f}")


def batches(
    model: AdapterModel, data: BenchmarkData, tasks: tuple[tuple[int, ...], ...]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Test samples of these tasks."""
    prepared = prepare(data, model.backbone)
    indices = [index for labels in tasks for index in task_indices(data.test, labels)]
    yield from DataLoader(as_dataset(prepared.data.test, indices, prepared.eval_transform), batch_size=128)


if __name__ == "__main__":
    command_of(main, __doc__)()
