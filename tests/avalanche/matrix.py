"""The rows of the two matrices in docs/avalanche.md, and what a strategy does with one.

WRITE_MATRIX=1 python -m pytest -q tests/avalanche/test_matrix.py    # writes the page; without it, it is compared
"""

from __future__ import annotations

import io
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from avalanche.benchmarks import ni_benchmark
from avalanche.evaluation.metrics import accuracy_metrics, forgetting_metrics, loss_metrics
from avalanche.logging import TextLogger
from avalanche.models.generator import MlpVAE
from avalanche.training import plugins as avalanche
from avalanche.training.plugins import EvaluationPlugin
from avalanche.training.supervised import VAETraining
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LinearLR, StepLR

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import ConfigError, DataError
from cl_adapters.strategies.base import strategies
from tests.avalanche import streams
from tests.avalanche.small import differing, make, state, train
from tests.avalanche.streams import images, in_turn, pairs

Options = dict[str, Any]
Train = Callable[[Any, Any, FrozenBackbone], Any]
OURS = ("optimizer=", "task_incremental", "OnlineCLExperience")
"""What may be named instead of a plugin; no warning of Avalanche has these words."""


@dataclass(frozen=True)
class Cell:
    """What a strategy does with a row: it works, with a warning where there is a reason; or that is all it says.

    Attributes:
        kind: in the table.
        reason: the first sentence of warning or error, without the names of strategy and plugin.
    """

    kind: Literal["works", "no effect", "refused"]
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A row of the first matrix.

    Attributes:
        options: keywords of the strategy, anew for every run, with one plugin or an evaluator.
        plain: the same without the plugin.
        stream: to train on.
    """

    options: Callable[[], Options]
    plain: Callable[[], Options] = dict
    stream: Callable[[], list[Any]] = lambda: pairs(shuffled=True)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A row of the second matrix.

    Attributes:
        benchmark: to train and to evaluate on.
        options: keywords of the strategy.
        train: how: from a strategy, the benchmark and the backbone to the strategy in the end.
        least: accuracy in the end; a masked loss over one class alone teaches nothing.
    """

    benchmark: Callable[[], Any]
    options: Callable[[], Options] = dict
    train: Train = lambda strategy, made, _: train(strategy, made.train_stream)
    least: float = 0.4


# --- plugins ----------------------------------------------------------------------------------------------------------


def one(make_plugin: Callable[[], Any]) -> Plugin:
    """A row of a plugin and no other keyword."""
    return Plugin(options=lambda: {"plugins": [make_plugin()]})


def generative_replay() -> Any:
    generator: Any = MlpVAE((3, 16, 16), nhid=4)
    rate = torch.optim.Adam(generator.parameters(), lr=0.01)
    return avalanche.GenerativeReplayPlugin(
        generator_strategy=VAETraining(model=generator, optimizer=rate, train_mb_size=6, evaluator=None)
    )


def own_sgd() -> Options:
    return {"optimizer": SGD([torch.zeros(1)], lr=0.05)}


def halved(granularity: Literal["epoch", "iteration"]) -> Options:
    """A learning rate that is halved each time."""
    options = own_sgd()
    schedule = StepLR(options["optimizer"], 1, gamma=0.5)
    return options | {"plugins": [avalanche.LRSchedulerPlugin(schedule, step_granularity=granularity)]}


def measured(*loggers: Any) -> Options:
    """Metrics in training, and an evaluation after every epoch."""
    metrics = [*accuracy_metrics(epoch=True, stream=True), *loss_metrics(epoch=True), *forgetting_metrics(stream=True)]
    return {"evaluator": EvaluationPlugin(metrics, loggers=list(loggers)), "eval_every": 1, "train_epochs": 6}


def by_fours() -> Options:
    """GSS works with few sizes of batch, in Avalanche's own strategies too."""
    return {"train_mb_size": 4, "train_epochs": 1}


PLUGINS: dict[str, Plugin] = {
    "Replay": one(lambda: avalanche.ReplayPlugin(mem_size=6)),
    "EWC": one(lambda: avalanche.EWCPlugin(50.0)),
    "EWC, online": one(lambda: avalanche.EWCPlugin(50.0, mode="online", decay_factor=0.5)),
    "MAS": one(lambda: avalanche.MASPlugin(lambda_reg=5.0)),
    "SynapticIntelligence": one(lambda: avalanche.SynapticIntelligencePlugin(5.0)),
    "LwF": one(lambda: avalanche.LwFPlugin(1.0, 2.0)),
    "AGEM": one(lambda: avalanche.AGEMPlugin(6, 6)),
    "GEM": one(lambda: avalanche.GEMPlugin(6, 0.5)),
    "MIR": Plugin(  # acts from the third experience on
        options=lambda: {"plugins": [avalanche.MIRPlugin(batch_size_mem=3, mem_size=16, subsample=6)]},
        stream=partial(pairs, classes=6),
    ),
    "GSS_greedy": Plugin(
        options=lambda: by_fours() | {"plugins": [avalanche.GSS_greedyPlugin(48, 5, [3, 16, 16])]},
        plain=by_fours,
        stream=partial(pairs, each=24),
    ),
    "GenerativeReplay": one(generative_replay),
    "RWalk": one(avalanche.RWalkPlugin),
    "GDumb": one(avalanche.GDumbPlugin),
    "FromScratchTraining": one(lambda: avalanche.FromScratchTrainingPlugin()),
    "LFL": one(lambda: avalanche.LFLPlugin(0.1)),
    "FeatureDistillation": one(avalanche.FeatureDistillationPlugin),
    "CoPE": one(avalanche.CoPEPlugin),
    "CWRStar": one(lambda: avalanche.CWRStarPlugin(nn.Linear(2, 2))),
    "BiC": one(avalanche.BiCPlugin),
    "RAR": one(lambda: avalanche.RARPlugin(4, 8)),
    "CurrentDataNCMUpdate": one(avalanche.CurrentDataNCMUpdate),
    "EarlyStopping": Plugin(
        options=lambda: measured() | {"plugins": [avalanche.EarlyStoppingPlugin(1, "train_stream")]}, plain=measured
    ),
    "LRScheduler, by epoch": Plugin(options=partial(halved, "epoch"), plain=own_sgd),
    "LRScheduler, by iteration": Plugin(options=partial(halved, "iteration"), plain=own_sgd),
    "Evaluation": Plugin(options=lambda: measured(TextLogger(io.StringIO())), plain=lambda: {"train_epochs": 6}),
}


def of_plugin(name: str, row: Plugin, backbone: FrozenBackbone, plain: dict[Any, Any]) -> Cell:
    """Train with the plugin, and once for all that share it in ``plain`` without.

    Raises:
        AssertionError: it has no effect and nobody says so, or leaves something behind; or a refusal is no clear one.
    """
    options = row.options()
    given = options.get("plugins", [options.get("evaluator")])[0]
    strategy, cell = tried(name, backbone, options, row.stream(), type(given).__name__)
    if strategy is None:
        return cell
    key = name, row.plain, repr(row.stream)
    if key not in plain:
        plain[key], _ = tried(name, backbone, row.plain(), row.stream())
    without = plain[key]
    wants = [dict(each.model.named_parameters()) for each in (without, strategy)]
    assert all(wants[0][key].requires_grad == wants[1][key].requires_grad for key in wants[0].keys() & wants[1].keys())
    assert strategy.model.predict(streams.PATTERNS).isfinite().all()
    same = not differing(state(without.model), state(strategy.model))
    if isinstance(given, EvaluationPlugin):
        assert same, "measuring changes nothing"
        assert "Top1_Acc_Stream" in given.loggers[0].file.getvalue()
        return cell
    assert cell.reason or not same, f"{name}: {type(given).__name__} has no effect, and nobody says so"
    return Cell("no effect" if same else "works", cell.reason)


# --- streams and settings ---------------------------------------------------------------------------------------------


def own_recipe() -> Options:
    return {
        "optimizer": partial(AdamW, lr=0.01, weight_decay=0.01),
        "scheduler": partial(LinearLR, start_factor=0.3, total_iters=2),
        "criterion": nn.CrossEntropyLoss(label_smoothing=0.1),
    }


def with_validation(strategy: Any, made: Any, _: FrozenBackbone) -> Any:
    """Train on it too, as one does in the end."""
    train(strategy, made.train_stream)
    strategy.eval(made.streams["valid"])
    return train(strategy, made.streams["valid"])


def saved(strategy: Any, made: Any, backbone: FrozenBackbone) -> Any:
    first, *rest = made.train_stream
    with tempfile.TemporaryDirectory() as folder:
        saved = train(strategy, [first]).save(Path(folder) / "saved")
        again = type(strategy).load(saved, backbone, evaluator=accuracy)
    again.recall([first])
    return train(again, rest)


SETTINGS: dict[str, Setting] = {
    "class-incremental": Setting(benchmark=streams.halves),
    "one class per experience": Setting(benchmark=lambda: in_turn([2], [0], [3], [1]), least=-1),
    "labels with gaps": Setting(benchmark=lambda: in_turn([2, 0], [1, 3], names=(7, 100, 3, 50))),
    "labels up to 30,000,000": Setting(benchmark=lambda: in_turn([2, 0], [1, 3], names=(7, 30_000_000, 3, 50))),
    "task labels, `task_incremental=True`": Setting(
        benchmark=streams.with_task_labels, options=lambda: {"task_incremental": True}
    ),
    "task labels without it": Setting(benchmark=streams.with_task_labels),
    "domain-incremental": Setting(benchmark=streams.domains),
    "`new_instances_benchmark`": Setting(benchmark=streams.new_instances),
    "`ni_benchmark`": Setting(
        benchmark=lambda: ni_benchmark(
            images(range(4), 9, 0), images(range(4), 6, 99), 3, seed=0, balance_experiences=True
        )
    ),
    "`data_incremental_benchmark`": Setting(benchmark=streams.parts),
    "`split_online_stream`": Setting(
        benchmark=streams.halves,
        train=lambda strategy, made, _: train(strategy, streams.online(made)),
    ),
    "repetition": Setting(benchmark=streams.repetition),
    "`benchmark_with_validation_stream`": Setting(benchmark=streams.with_validation, train=with_validation),
    "AdamW, warm-up, label smoothing": Setting(benchmark=streams.halves, options=own_recipe),
    "`save` and `load` between tasks": Setting(benchmark=streams.halves, train=saved),
}


def accuracy() -> EvaluationPlugin:
    return EvaluationPlugin(accuracy_metrics(stream=True), loggers=[])


def of_setting(name: str, row: Setting, backbone: FrozenBackbone) -> Cell:
    """Train and evaluate.

    Raises:
        AssertionError: it learned too little, or classes twice; or a refusal is no clear one.
    """
    made = row.benchmark()
    options = {"evaluator": accuracy(), **row.options()}
    strategy, cell = tried(name, backbone, options, made, teach=row.train)
    if strategy is None:
        return cell
    reached = list(strategy.eval(made.test_stream).values())
    assert sum(reached) / len(reached) > row.least, reached
    labels = {label for experience in made.test_stream for label in experience.dataset.targets}
    model = strategy.model
    assert sorted(model.classes) == sorted(labels), "no class has two columns"
    assert {model.head.num_classes, model.prototypes.num_classes} <= {0, len(labels)}
    assert model.predict(streams.PATTERNS).isfinite().all()
    return cell


def tried(
    name: str,
    backbone: FrozenBackbone,
    options: Options,
    made: Any,
    plugin: str = "",
    teach: Train = lambda strategy, made, _: train(strategy, made),
) -> tuple[Any, Cell]:
    """The trained strategy, or None where it refuses, and what it said."""
    owner, strategy, refusal = strategies.get(name).__name__, None, ""
    names = (plugin, *OURS) if plugin else OURS

    def reason(text: str) -> str:
        found = text.partition(". ")[0].replace(f"{owner} ", "the strategy ")
        return found.replace(f"Avalanche's {plugin}", "the plugin").replace(plugin, "the plugin") if plugin else found

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            strategy = make(name, backbone, **options)
            strategy = teach(strategy, made, backbone)
        except (ConfigError, DataError) as error:
            refusal = str(error)
    if refusal:
        assert any(each in refusal for each in names), refusal
        assert strategy is None or strategy.clock.train_iterations == len(strategy.model.classes) == 0
        return None, Cell("refused", reason(refusal))
    said = [str(each.message) for each in told if issubclass(each.category, UserWarning)]
    ours = {reason(text): None for text in said if any(each in text for each in names)}
    return strategy, Cell("works", "; ".join(ours))


# --- the page ---------------------------------------------------------------------------------------------------------

Table = dict[tuple[str, str], Cell]


def written(rows: Sequence[str], columns: Sequence[str], cells: Table) -> str:
    """A table in Markdown, and a note for each reason."""
    notes: list[str] = []
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for row in rows:
        texts = []
        for column in columns:
            cell = cells[row, column]
            if cell.reason and cell.reason not in notes:
                notes.append(cell.reason)
            texts.append(cell.kind + (f" [{notes.index(cell.reason) + 1}]" if cell.reason else ""))
        lines.append(f"| {row} | {' | '.join(texts)} |")
    return "\n".join([*lines, "", *(f"- [{place}] {note}" for place, note in enumerate(notes, 1))])


def read(text: str) -> Table:
    """What :func:`written` wrote."""
    lines = text.splitlines()
    notes = dict(line.removeprefix("- [").split("] ", 1) for line in lines if line.startswith("- ["))
    head, _, *body = [[word.strip() for word in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    found: Table = {}
    for row, *texts in body:
        for column, text in zip(head[1:], texts, strict=True):
            kind, _, note = text.partition(" [")
            found[row, column] = Cell(kind, notes[note[:-1]] if note else "")  # type: ignore[arg-type]
    return found
