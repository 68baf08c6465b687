"""Old import paths of modules that have moved: they lead to the new place, with a DeprecationWarning."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

from cl_adapters._alias import AliasLoader

NEW_PLACES = {
    "abstention": "openset",
    "alignment": "model.alignment",
    "answers": "model.predict",
    "attention_sites": "sites.attention",
    "backbone": "backbones.frozen",
    "backbone_sources": "backbones.load",
    "batches": "backbones.inputs",
    "benchmarks.augmentation": "benchmarks.streams.augmentation",
    "benchmarks.bench_index": "benchmarks.bench.index",
    "benchmarks.bench_out_of_scope": "benchmarks.bench.out_of_scope",
    "benchmarks.bench_photographs": "benchmarks.bench.photographs",
    "benchmarks.bench_pool": "benchmarks.bench.pool",
    "benchmarks.bench_public_mos": "benchmarks.bench.public_mos",
    "benchmarks.bench_public_sema": "benchmarks.bench.public_sema",
    "benchmarks.bench_retrieval": "benchmarks.bench.retrieval",
    "benchmarks.bench_same_numbers": "benchmarks.bench.same_numbers",
    "benchmarks.bench_sema_step": "benchmarks.bench.sema_step",
    "benchmarks.bench_texts": "benchmarks.bench.texts",
    "benchmarks.chart_grid": "benchmarks.report.chart_grid",
    "benchmarks.charts": "benchmarks.report.charts",
    "benchmarks.comparison": "benchmarks.bench.comparison",
    "benchmarks.data_instruct": "benchmarks.data._instructions",
    "benchmarks.datasets": "benchmarks.streams.datasets",
    "benchmarks.evaluation": "benchmarks.run.evaluation",
    "benchmarks.experiment": "benchmarks.run.experiment",
    "benchmarks.glyph_batches": "benchmarks.glyphs.batches",
    "benchmarks.glyph_classes": "benchmarks.glyphs.classes",
    "benchmarks.glyph_render": "benchmarks.glyphs.render",
    "benchmarks.index_cli": "benchmarks.cli.index",
    "benchmarks.index_evaluate_cli": "benchmarks.cli.index_evaluate",
    "benchmarks.instruct": "benchmarks.run.instruct",
    "benchmarks.instruct_cli": "benchmarks.cli.instruct",
    "benchmarks.instruct_results": "benchmarks.results.instruct",
    "benchmarks.pool_accuracy": "benchmarks.run.pool_accuracy",
    "benchmarks.pool_cli": "benchmarks.cli.pool",
    "benchmarks.pool_exchange_cli": "benchmarks.cli.pool_exchange",
    "benchmarks.pool_life_cli": "benchmarks.cli.pool_life",
    "benchmarks.pool_of_run": "benchmarks.run.pool_of_run",
    "benchmarks.predict_cli": "benchmarks.cli.predict",
    "benchmarks.prepared": "benchmarks.streams.prepared",
    "benchmarks.pretrain_vit_glyph": "benchmarks.glyphs.pretrain",
    "benchmarks.probe_vit_glyph": "benchmarks.glyphs.probe",
    "benchmarks.public_code": "benchmarks.bench.public_code",
    "benchmarks.report_figures": "benchmarks.report.figures",
    "benchmarks.report_growth": "benchmarks.report.growth",
    "benchmarks.report_routing": "benchmarks.report.routing",
    "benchmarks.result_parts": "benchmarks.results.parts",
    "benchmarks.rows": "benchmarks.run.rows",
    "benchmarks.run_folder": "benchmarks.run.session",
    "benchmarks.runner": "benchmarks.run.runner",
    "benchmarks.settings": "benchmarks.cli.options",
    "benchmarks.svg": "benchmarks.report.svg",
    "benchmarks.table": "benchmarks.bench.table",
    "benchmarks.text_benchmark": "benchmarks.data._text_benchmark",
    "benchmarks.text_files": "benchmarks.data._text_files",
    "benchmarks.tokenised": "benchmarks.streams.tokenised",
    "benchmarks.variants": "benchmarks.bench.variants",
    "entering": "backbones.partial",
    "files": "_io",
    "fingerprint": "backbones.card",
    "heads": "model.heads",
    "hf_forward": "backbones.hf_forward",
    "hf_image": "backbones.hf_image",
    "hf_source": "backbones.hf_load",
    "strategies.lifecycle": "strategies.base",
    "strategies.expansion": "strategies.base",
    "hidden_store": "strategies._loop.activation_cache",
    "index.base": "index.backends.base",
    "index.choice": "index.contents",
    "index.exact": "index.backends.exact",
    "index.faiss": "index.backends._faiss",
    "index.flat": "index.backends.flat",
    "index.hnsw": "index.backends.hnsw",
    "index.index_files": "index.files",
    "index.ivf": "index.backends.ivf",
    "index.ivfpq": "index.backends.ivfpq",
    "language_answers": "language.model",
    "language_passes": "language.model",
    "language_routes": "bank.routes",
    "language_source": "language.load",
    "language_tokens": "language.tokens",
    "model_files": "model.files",
    "origins": "model.state",
    "passes": "backbones.partial",
    "pool.changes": "pool.edit",
    "pool.interchange": "pool.transfer",
    "pool.new_adapter": "pool.edit",
    "preprocessing": "backbones.preprocessing",
    "randomness": "_seeding",
    "retrieval": "parts.keys",
    "routes": "bank.routes",
    "site_adapters": "bank.site_adapters",
    "site_families": "sites.families",
    "site_families_timm": "sites.timm",
    "site_families_transformers": "sites.transformers",
    "site_families_vision": "sites.vision",
    "site_places": "sites.places",
    "slot_stacks": "bank.slot_stacks",
    "statistics": "model.statistics",
    "storage": "_io",
    "strategies.experiences": "strategies._loop.experiences",
    "strategies.lookup": "strategies.base",
    "strategies.order": "strategies._loop.order",
    "strategies.views": "strategies._loop.activation_cache",
    "text_preprocessing": "backbones.text",
    "timing": "_timing",
    "tokens": "backbones.tokens",
}
"""Old path to new path, both relative to ``cl_adapters``."""


class _RenamedFinder(MetaPathFinder):
    """Asked last, when no file has the name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        new = NEW_PLACES.get(fullname.removeprefix("cl_adapters."))
        if new is None or not fullname.startswith("cl_adapters."):
            return None
        found = importlib.util.find_spec(f"cl_adapters.{new}")
        return found and ModuleSpec(fullname, _RenamedLoader(found), origin=found.origin)


class _RenamedLoader(AliasLoader):
    def exec_module(self, module: ModuleType) -> None:
        self._warn(module.__name__)
        super().exec_module(module)

    def get_code(self, fullname: str) -> CodeType | None:
        self._warn(fullname)
        return super().get_code(fullname)

    def _warn(self, old: str) -> None:
        warnings.warn(
            f"{old} is now {self.found.name}; the old name goes in version 0.3", DeprecationWarning, stacklevel=3
        )


def install() -> None:
    """Let old paths be found, once."""
    if not any(isinstance(finder, _RenamedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_RenamedFinder())
