"""What reads the folders, within limits of time and memory, and what came of it: one of five outcomes.

same answer             to the last bit, as from the folder that nobody touched
clean error             one of the package's own; of a command: an exit code, and one line
another model           the digests were computed anew, or a file was changed that has none: nobody can tell
accepted and different  a digest should have told, or numbers that are none came out
crash                   anything else: a foreign error, a hang, too much memory, code that was run
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from cl_adapters import AdapterIndex, AdapterModel, AdapterPool
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.errors import ClAdaptersError
from tests.hostile.mutations import BOMB, OWN, Plan, apply, files_of, own_digest, regular

FROZEN = Path(__file__).parents[1] / "data" / "frozen"
SECONDS = 5
MEMORY = 2 << 30
"""Bytes that a reader may ask for beyond what the process has."""

SAME, CLEAN, ANOTHER, BAD, CRASH = OUTCOMES = (
    "same answer",
    "clean error",
    "another model",
    "accepted and different",
    "crash",
)
DESCRIPTIONS = {
    "model.json",
    "manifest.json",
    "index.json",
    "config.json",
    "row.json",
    "results.json",
    "instruct.json",
    "strategy.json",
}
"""Files whose digest stands in no other file, though it may in themselves."""


PREFIX = "hostile-"
"""Of the folders of copies, all of one length, so that the tables of commands are as wide."""


class Hang(BaseException):
    """The reader took too long. No Exception, so that nothing on the way takes it for one."""


class Reached(BaseException):
    """A run has been restored, and would train now."""


@dataclass
class Found:
    """What a reader found: ``bits`` by step, to be compared; clean ``errors``; ``flaws``: what may never come out."""

    bits: dict[str, Any] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    flaws: list[str] = field(default_factory=list)

    def take(self, step: str, act: Callable[[], Any]) -> Any:
        """The value of a step, also kept; None where it is a clean error."""
        try:
            value = act()
        except ClAdaptersError as error:
            self.errors.append(f"{step}: {type(error).__name__} {error}")
            return None
        self.bits[step] = value
        return value

    def need(self, holds: bool, what: str) -> None:
        """Note a flaw unless it holds."""
        if not holds:
            self.flaws.append(what)


Reader = Callable[[Path, Found], None]


@dataclass(frozen=True)
class Kind:
    """A kind of folder: some of it, and what reads such. One of the readers is drawn for each mutant."""

    name: str
    folders: tuple[Path, ...]
    readers: tuple[Reader, ...]

    @functools.cached_property
    def expected(self) -> dict[tuple[int, int], dict[str, Any]]:
        """By folder and reader: what each step finds in the folder as it is, and in runs of fewer tasks."""
        found: dict[tuple[int, int], dict[str, Any]] = {}
        for number, folder in enumerate(self.folders):
            for place, reader in enumerate(self.readers):
                steps: dict[str, Any] = {}
                with tempfile.TemporaryDirectory(prefix=PREFIX) as scratch:
                    copy = Path(shutil.copytree(folder, Path(scratch) / "x"))
                    tasks = sorted((copy / "tasks").glob("*"), reverse=True)
                    for last in (None, *tasks):
                        if last is not None:
                            shutil.rmtree(last)
                        whole = Found()
                        with warnings.catch_warnings():
                            warnings.simplefilter("ignore")
                            reader(copy, whole)
                        assert last is not None or not (whole.errors or whole.flaws), whole
                        steps = whole.bits | steps
                found[number, place] = steps
        return found


@dataclass(frozen=True)
class Verdict:
    """What became of one mutant: ``outcome``, ``why`` in one line, and ``where`` a foreign error came from."""

    outcome: str
    why: str
    done: tuple[str, ...]
    where: str = ""

    @property
    def bad(self) -> bool:
        """Whether that may not happen."""
        return self.outcome in (BAD, CRASH)


def judge(kind: Kind, plan: Plan) -> Verdict:
    """Damage a copy of a folder as planned, read it, and tell what came of it."""
    number, place = plan.folder % len(kind.folders), plan.reader % len(kind.readers)
    folder, donor = kind.folders[number], kind.folders[(number + 1) % len(kind.folders)]
    expected = kind.expected[number, place]
    with tempfile.TemporaryDirectory(prefix=PREFIX) as scratch:
        copy = Path(shutil.copytree(folder, Path(scratch) / "x"))
        done = (*apply(plan, copy, donor), *(("digests computed anew",) if plan.sealed_again else ()))
        sealed = not plan.sealed_again and not any(_untold(copy / name) for name in _changed(folder, copy))
        found = Found()
        try:
            with bounded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kind.readers[place](copy, found)
        except KeyboardInterrupt:
            raise
        except ClAdaptersError as error:
            found.errors.append(f"{type(error).__name__} {error}")
        except BaseException as error:
            return Verdict(CRASH, f"{type(error).__name__}: {str(error)[:300]}", done, _where(error))
        if (Path(scratch) / BOMB).exists():
            return Verdict(CRASH, "code from a pickle was run", done, "pickle")
    if found.flaws:
        return Verdict(BAD, found.flaws[0], done, found.flaws[0].partition(":")[0])
    other = [step for step, value in found.bits.items() if step not in expected or not _equal(value, expected[step])]
    if other and sealed:
        return Verdict(BAD, f"another {other[0]}, though no digest was computed anew", done, other[0])
    if found.errors:
        return Verdict(CLEAN, found.errors[0], done)
    return Verdict(ANOTHER, f"another {other[0]}", done) if other else Verdict(SAME, "", done)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Raise :class:`Hang` after :data:`SECONDS`, MemoryError beyond :data:`MEMORY`."""

    def late(*_: object) -> None:
        raise Hang(f"not done after {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS, SECONDS)  # again, where something on the way drops it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def _changed(folder: Path, copy: Path) -> set[str]:
    """Names of the files that are not what they were, below the folder."""
    one, two = ({str(path.relative_to(at)): path for path in files_of(at)} for at in (folder, copy))
    return {
        name for name in {*one, *two} if name not in one or name not in two or not _same_bytes(one[name], two[name])
    }


def _untold(path: Path) -> bool:
    """Whether nobody can tell that this changed file was changed."""
    if path.name not in DESCRIPTIONS:
        return False
    if not regular(path):
        return True
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return True
    return not isinstance(content, dict) or OWN not in content or content[OWN] == own_digest(content)


def _same_bytes(one: Path, two: Path) -> bool:
    return one.read_bytes() == two.read_bytes()


def _equal(one: Any, two: Any) -> bool:
    return bool(one == two)


def _where(error: BaseException) -> str:
    """The last line of the package on the way to an error, as a name for what is wrong."""
    frames = traceback.extract_tb(error.__traceback__)
    root = str(Path(__file__).parents[2])
    own = [f for f in frames if f.filename.startswith(root) and "/tests/" not in f.filename] or frames[-1:]
    name = own[-1].filename.removeprefix(root).lstrip("/").replace("cl_adapters/benchmarks/", "benchmarks/")
    return f"{type(error).__name__} at {name}:{own[-1].lineno} {own[-1].name}: {own[-1].line}"


# --- models ------------------------------------------------------------------------------------------------------


@functools.cache
def backbone() -> FrozenBackbone:
    """The embedded one, on which all frozen folders but those of the decoder are."""
    return FrozenBackbone.load("vit_glyph_tiny")


@functools.cache
def images() -> Tensor:
    """Four images as the backbone takes them, float32 [4, 3, 32, 32]."""
    from PIL import Image

    transform: Any = backbone().preprocessing
    files = sorted((FROZEN / "images").glob("*.png"))[:4]
    return torch.stack([transform.eval_transform()(Image.open(file).convert("RGB")) for file in files])


@functools.cache
def features() -> Tensor:
    """Of these images under the bare backbone, float32 [4, D]."""
    with torch.no_grad():
        return backbone().features(images())


def bits(tensors: dict[str, Tensor]) -> bytes:
    """Names, types, shapes and bytes."""
    return bytes(save({name: value.contiguous() for name, value in tensors.items()}))


def ask(model: AdapterModel, found: Found, step: str, batch: Any) -> None:
    """What a model says of itself, and its logits."""
    found.bits[f"{step}: classes"] = (
        tuple(model.classes),
        dict(model.class_names),
        tuple(model.task_of_column.tolist()),
        tuple(model.task_of_slot),
        model.num_slots,
        sorted(model.parts),
        repr(model.predictor),
    )
    found.need(len(set(model.classes)) == len(model.classes), f"{step} has a class twice: {model.classes}")
    found.need(all(task >= 0 for task in model.task_of_column.tolist()), f"{step} has a negative task")
    logits: list[Tensor] = []

    def predict() -> bytes:
        logits.append(model.predict(batch))
        return bits({"logits": logits[0]})

    if found.take(f"{step}: logits", predict) is not None:
        fits = list(logits[0].shape) == [len(batch), len(model.classes)]
        found.need(fits, f"{step} gives logits {list(logits[0].shape)} for {len(model.classes)} classes")
        found.need(bool(torch.isfinite(logits[0]).all()), f"{step} gives logits that are no finite numbers")


def read_model(folder: Path, found: Found) -> None:
    """Load and predict."""
    loaded: list[AdapterModel] = []
    found.take("model", lambda: loaded.append(AdapterModel.load(folder, backbone())))
    if loaded:
        ask(loaded[0], found, "model", images())


def read_model_by_name(folder: Path, found: Found) -> None:
    """The same with the backbone that the folder names."""
    loaded: list[AdapterModel] = []
    found.take("model", lambda: loaded.append(AdapterModel.load(folder)))
    if loaded:
        ask(loaded[0], found, "model", images())


# --- strategies --------------------------------------------------------------------------------------------------


class Sums:
    """A plugin that keeps a tensor and a number."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def new_evaluator() -> Any:
    """One that remembers, without a word."""
    from avalanche.evaluation.metrics import forgetting_metrics
    from avalanche.training.plugins import EvaluationPlugin

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EvaluationPlugin(forgetting_metrics(experience=True, stream=True))


def read_strategy(folder: Path, found: Found) -> None:
    """Load, and look at all that it goes on with."""
    from cl_adapters.strategies import MOS
    from cl_adapters.strategies._loop.kept import state_of

    sums, loaded = Sums(), []
    plugins: Any = [sums]

    def load() -> None:
        loaded.append(MOS.load(folder, backbone(), plugins=plugins, evaluator=new_evaluator()))

    found.take("strategy", load)
    if not loaded:
        return
    strategy = loaded[0]
    evaluator = strategy.evaluator
    found.bits["settings"] = repr((strategy.config, strategy.seed, strategy.model.class_names, vars(strategy.clock)))
    found.bits["task classes"] = repr((strategy.task_incremental, strategy._task_classes.to_plain()))
    found.bits["measured"] = repr((evaluator.all_metric_results, evaluator.last_metric_results))
    found.bits["metrics"] = repr([state_of(metric) for metric in evaluator.metrics])
    found.bits["plugin"] = (repr(sums.state.get("count")), bits({"sums": sums.state["sums"]}))
    ask(strategy.model, found, "model of a strategy", images())


# --- pools and indexes -------------------------------------------------------------------------------------------


class Told(ClAdaptersError):
    """What a reader reports rather than raises."""


def read_pool(folder: Path, found: Found) -> None:
    """Everything that a pool has."""
    opened: list[AdapterPool] = []
    found.take("pool", lambda: opened.append(AdapterPool.open(folder, backbone=backbone())))
    if not opened:
        return
    pool = opened[0]
    found.take("records", lambda: tuple(map(repr, pool.list())))
    found.take("broken", lambda: _told([f"{entry.id} is broken: {entry.reason}" for entry in pool.broken]))
    for id in pool.ids:
        found.take(f"tensors of {id}", lambda id=id: bits(pool.tensors(id)))  # type: ignore[misc]
        found.take(f"knowledge of {id}", lambda id=id: bits(pool.knowledge(id)))  # type: ignore[misc]
    found.take("verify", lambda: _told(pool.verify().problems))


def model_of(index: str | None) -> Reader:
    """A model of a pool, with or without an index."""

    def read(folder: Path, found: Found) -> None:
        made: list[AdapterModel] = []
        found.take("pool's model", lambda: made.append(_from_pool(folder, index)))
        if made:
            ask(made[0], found, "pool's model", images())

    return read


def _from_pool(folder: Path, index: str | None) -> AdapterModel:
    return AdapterModel.from_pool(AdapterPool.open(folder, backbone=backbone()), index=index)


def _told(problems: Sequence[str]) -> None:
    if problems:
        raise Told("; ".join(problems))


@functools.cache
def whole_pool() -> AdapterPool:
    """The frozen pool, which no mutant touches."""
    return AdapterPool.open(FROZEN / "pool", backbone=backbone())


def read_index(folder: Path, found: Found) -> None:
    """Open both ways, and search."""
    for name, verify, mmap in (("index", False, True), ("verified index", True, False)):
        opened: list[AdapterIndex] = []

        def open_it(verify: bool = verify, mmap: bool = mmap, opened: list[AdapterIndex] = opened) -> None:
            opened.append(AdapterIndex.open(folder, whole_pool(), verify=verify, mmap=mmap))

        found.take(name, open_it)
        if not opened:
            continue
        index = opened[0]
        found.take(f"{name}: figures", lambda index=index: (repr(index.stats()), index.threshold))  # type: ignore[misc]
        for classes in (False, True):
            hits: list[Any] = []

            def search(index: AdapterIndex = index, classes: bool = classes, hits: list[Any] = hits) -> str:
                neighbours = index.search_features(features(), 3, classes=classes)
                hits += index.hits(neighbours)
                return repr(hits)

            if found.take(f"{name}: hits, classes {classes}", search) is not None:
                finite = all(np.isfinite(hit.score) for row in hits for hit in row)
                found.need(finite, f"{name} gives scores that are no finite numbers")


# --- runs --------------------------------------------------------------------------------------------------------


def read_latest_model(folder: Path, found: Found) -> None:
    """What `cl-adapters predict` does."""
    from cl_adapters.benchmarks.run.session import complete_tasks, latest_model

    loaded: list[AdapterModel] = []
    with _cached():
        found.take("run's model", lambda: loaded.append(latest_model(folder)))
    if loaded:
        ask(loaded[0], found, f"model after {len(complete_tasks(folder))} tasks", images())


def read_results(folder: Path, found: Found) -> None:
    """Results and their report."""
    from cl_adapters.benchmarks.report.report import write_report
    from cl_adapters.benchmarks.results.results import read

    def report(name: Path = folder / "hostile-report.html") -> str:
        results = read(folder)
        write_report(results, name)
        return repr(results) + name.read_text(encoding="utf-8")

    found.take("report", report)


def read_instruct_results(folder: Path, found: Found) -> None:
    """The same of instructions, as `cl-adapters instruct` prints them."""
    from cl_adapters.benchmarks.cli.instruct import show
    from cl_adapters.benchmarks.results.instruct import read

    def printed() -> str:
        results = read(folder)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            show(results)
        return repr(results) + out.getvalue()

    found.take("printed", printed)


def resume_run(folder: Path, found: Found) -> None:
    """Resume up to where it would train."""
    from cl_adapters.benchmarks.run import runner

    with _cached():
        _resume(folder, found, runner, images())


def resume_instruct(folder: Path, found: Found) -> None:
    """The same of a run of instructions."""
    from cl_adapters.benchmarks.run import instruct

    with _cached():
        _resume(folder, found, instruct, None)


def _resume(folder: Path, found: Found, module: Any, batch: Tensor | None) -> None:
    def reached(runner: Any, task: int, rows: Any) -> None:
        found.bits[f"rows after {task} tasks"] = json.dumps(rows)
        model = runner.model
        if batch is not None:
            ask(model, found, f"model restored after {task} tasks", batch)
        else:
            tensors = {f"{slot} {key}": v for slot in range(model.num_slots) for key, v in model.bank.named_slot(slot)}
            found.bits[f"adapters after {task} tasks"] = bits(tensors) if tensors else b""
            finite = all(bool(torch.isfinite(value).all()) for value in tensors.values())
            found.need(finite, "model restored has numbers that are not finite")
        raise Reached

    with mock.patch.object(module._Runner, "run_task", reached), contextlib.suppress(Reached):
        found.take("resume", lambda: module.resume(folder))


@contextlib.contextmanager
def _cached() -> Iterator[None]:
    """Backbones are loaded, and images read, once for all mutants; whatever they name is asked for in earnest."""
    from cl_adapters.benchmarks.data.digits import Digits
    from cl_adapters.language.model import LanguageModel

    with (
        mock.patch.object(FrozenBackbone, "load", _once(FrozenBackbone.load)),
        mock.patch.object(LanguageModel, "load", _once(LanguageModel.load)),
        mock.patch.object(Digits, "load", _once_of(Digits.load)),
    ):
        yield


_KEPT: dict[str, Any] = {}


def _once(load: Any) -> Any:
    def kept(*args: Any, **options: Any) -> Any:
        key = repr((load.__qualname__, args, sorted(options.items())))
        if key not in _KEPT:
            _KEPT[key] = load(*args, **options)
        return _KEPT[key]

    return kept


def _once_of(load: Any) -> Any:
    def kept(config: Any, seed: int = 0) -> Any:
        key = repr((load.__qualname__, config, seed))
        if key not in _KEPT:
            _KEPT[key] = load(config, seed)
        return _KEPT[key]

    return kept


# --- commands ----------------------------------------------------------------------------------------------------


def command(*words: str) -> Reader:
    """`cl-adapters` with these words, of which "@" begins a path below the folder."""

    def read(folder: Path, found: Found) -> None:
        from cl_adapters.benchmarks.cli import root

        argv = ["cl-adapters", *(str(folder / word[1:]) if word.startswith("@") else word for word in words)]
        out, err = io.StringIO(), io.StringIO()
        with (
            _cached(),
            mock.patch.object(sys, "argv", argv),
            mock.patch.dict(os.environ, {"COLUMNS": "200"}),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            try:
                root.main()
                code: Any = 0
            except SystemExit as ended:
                code = ended.code
        step = " ".join(word.removeprefix("@") for word in words)
        told = out.getvalue().replace(str(folder), "FOLDER")
        reported = [line for line in told.splitlines() if line.startswith(("broken: ", "orphan: "))]
        if reported:  # beside what can be used
            found.errors.append(f"{step}: {reported[0]}")
            return
        if code in (0, None):
            found.bits[step] = told
            return
        lines = err.getvalue().strip().splitlines() or told.strip().splitlines()
        found.errors.append(f"{step}: {lines[:1]}")
        plain = len(err.getvalue().strip().splitlines()) <= 1 and "Traceback" not in err.getvalue()
        found.need(bool(lines) and plain, f"{step} ends with {code} and {len(lines)} lines: {lines[:3]}")

    return read


POOL_COMMANDS = (
    command("pool", "ls", "@", "--json"),
    command("pool", "show", "@", "task-001", "--json"),  # without it the sizes of files, as they are, are shown
    command("pool", "verify", "@"),
    command("index", "stats", "@"),
    command("index", "query", "@", str(FROZEN / "images" / "00.png"), "--json"),
)
RUN_COMMANDS = (
    command("report", "@"),
    command("predict", "--run", "@", str(FROZEN / "images" / "00.png"), "--json"),
)


# --- the folders -------------------------------------------------------------------------------------------------


class OneTask:
    """Stops a run, as a kill would, when a task is saved."""

    def task_started(self, task: int, tasks: int, names: list[str]) -> None:
        """A task begins."""

    def progress(self, phase: str, done: int, total: int) -> None:
        """Within a task."""

    def task_finished(self, results: Any) -> None:
        """Stop."""
        raise Reached


class Place:
    """The folders of every kind, as they are before any damage: frozen ones, and what is made of them on first use."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.made: dict[str, Kind] = {}

    def kind(self, name: str) -> Kind:
        """One of :data:`KINDS`."""
        if name not in self.made:
            self.made[name] = KINDS[name](self)
        return self.made[name]

    def model(self, name: str) -> Path:
        """A model as it is saved today."""
        folder = self.scratch / name
        return folder if folder.exists() else AdapterModel.load(FROZEN / name, backbone()).save(folder)

    def strategy(self, seed: int) -> Path:
        """A strategy, as if it had trained and measured."""
        from cl_adapters.strategies import MOS

        folder = self.scratch / f"strategy-{seed}"
        if not folder.exists():
            plugins: Any = [sums := Sums()]
            model = AdapterModel.load(FROZEN / "mos", backbone())
            strategy = MOS(model, seed=seed, plugins=plugins, evaluator=new_evaluator(), class_names={99: "later"})
            sums.state = {"count": seed, "sums": torch.arange(8.0) + seed}
            strategy.clock.train_iterations, strategy.clock.train_exp_counter = 40 + seed, 2
            strategy._task_classes.load([(0, model.classes[:2]), (1, model.classes[2:])])
            for metric in strategy.evaluator.metrics:
                metric.train_exp_id, metric.forgetting.initial, metric.forgetting.last = 1, {0: 0.9, 1: 0.5}, {0: 0.25}
            strategy.evaluator.all_metric_results["loss"] = ([1, 2, 3], [0.5, float("nan"), seed])
            strategy.evaluator.last_metric_results["loss"] = 0.125
            strategy.save(folder)
        return folder

    def run(self) -> Path:
        """The interrupted run, gone on with for one task, so that it has results."""
        from cl_adapters.benchmarks.run.runner import resume

        folder = self.scratch / "run"
        if not folder.exists():
            shutil.copytree(FROZEN / "run-mos", folder)
            with _cached(), contextlib.suppress(Reached), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                resume(folder, listener=OneTask())
        return folder

    def instruct_run(self, method: str) -> Path:
        """The same of instructions; decoder and tasks are named as they lie here."""
        from cl_adapters.benchmarks.run.instruct import resume

        folder = self.scratch / f"instruct-{method}"
        if not folder.exists():
            shutil.copytree(FROZEN / folder.name, folder)
            config = json.loads((folder / "config.json").read_text())
            config["instruct"] |= {"model": f"hf:{FROZEN / 'decoder'}", "data": str(FROZEN / "tasks")}
            if OWN in config:
                config[OWN] = own_digest(config)
            (folder / "config.json").write_text(json.dumps(config, indent=1))
            with _cached(), contextlib.suppress(Reached), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                resume(folder, listener=OneTask())
        return folder

    def only(self, run: Path, file: str) -> Path:
        """A folder with one file of a run."""
        folder = self.scratch / f"{run.name}-{file}"
        folder.mkdir(exist_ok=True)
        shutil.copy(run / file, folder)
        return folder

    def pool(self) -> Path:
        """A second pool."""
        folder = self.scratch / "pool"
        if not folder.exists():
            pool = AdapterModel.load(FROZEN / "mos", backbone()).save_pool(folder, tags=["x"], compression="fp16")
            AdapterIndex.build(pool, keys="features").save()
        return folder

    def index(self, backend: str, metric: Any) -> Path:
        """An index of the frozen pool."""
        folder = self.scratch / f"{backend}-{metric}"
        if not folder.exists():
            AdapterIndex.build(whole_pool(), keys="features", backend=backend, metric=metric).save(folder)
        return folder


def _models(place: Place) -> tuple[Path, ...]:
    names = ("mos", "sema", "ranpac", "lae")
    return (*(FROZEN / name for name in names), *map(place.model, names))


KINDS: dict[str, Callable[[Place], Kind]] = {
    "model": lambda place: Kind("model", _models(place), (read_model, read_model, read_model_by_name)),
    "strategy": lambda place: Kind("strategy", (place.strategy(0), place.strategy(7)), (read_strategy,)),
    "pool": lambda place: Kind(
        "pool", (FROZEN / "pool", place.pool()), (read_pool, model_of(None), model_of("default"))
    ),
    "index": lambda place: Kind(
        "index",
        (
            FROZEN / "pool" / "index" / "default",
            place.index("exact", "mahalanobis"),
            place.index("hnsw", "cosine"),
            place.index("ivf", "l2"),
            place.index("sq8", "ip"),
        ),
        (read_index,),
    ),
    "run": lambda place: Kind("run", (place.run(),), (read_latest_model, resume_run)),
    "results": lambda place: Kind("results", (place.only(place.run(), "results.json"),), (read_results,)),
    "instruct run": lambda place: Kind(
        "instruct run", (place.instruct_run("retrieve"), place.instruct_run("o_lora")), (resume_instruct,)
    ),
    "instruct results": lambda place: Kind(
        "instruct results",
        tuple(place.only(place.instruct_run(method), "instruct.json") for method in ("retrieve", "o_lora")),
        (read_instruct_results,),
    ),
    "commands on a pool": lambda place: Kind("commands on a pool", (FROZEN / "pool", place.pool()), POOL_COMMANDS),
    "commands on a run": lambda place: Kind("commands on a run", (place.run(),), RUN_COMMANDS),
}


def tally(verdicts: Sequence[Verdict]) -> Counter[str]:
    """How many of each outcome."""
    return Counter(verdict.outcome for verdict in verdicts)
