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

_MOVED = {
    "": "abstention=openset files=_io randomness=_seeding storage=_io timing=_timing",
    "backbones": """
        backbone=frozen backbone_sources=load batches=inputs entering=partial fingerprint hf_forward hf_image
        hf_source=hf_load passes=partial preprocessing text_preprocessing=text tokens
    """,
    "bank": "language_routes=routes routes site_adapters slot_stacks",
    "benchmarks.bench": """
        benchmarks.bench_index=index benchmarks.bench_out_of_scope=out_of_scope benchmarks.bench_photographs=photographs
        benchmarks.bench_pool=pool benchmarks.bench_public_mos=public_mos benchmarks.bench_public_sema=public_sema
        benchmarks.bench_retrieval=retrieval
        benchmarks.bench_sema_step=sema_step benchmarks.bench_texts=texts benchmarks.comparison benchmarks.public_code
        benchmarks.table benchmarks.variants
    """,
    "benchmarks.cli": """
        benchmarks.index_cli=index benchmarks.index_evaluate_cli=index_evaluate benchmarks.instruct_cli=instruct
        benchmarks.pool_cli=pool benchmarks.pool_exchange_cli=pool_exchange benchmarks.pool_life_cli=pool_life
        benchmarks.predict_cli=predict benchmarks.settings=options
    """,
    "benchmarks.data": """
        benchmarks.data_instruct=_instructions benchmarks.text_benchmark=_text_benchmark
        benchmarks.text_files=_text_files
    """,
    "benchmarks.glyphs": """
        benchmarks.glyph_batches=batches benchmarks.glyph_classes=classes benchmarks.glyph_render=render
        benchmarks.pretrain_vit_glyph=pretrain benchmarks.probe_vit_glyph=probe
    """,
    "benchmarks.report": """
        benchmarks.chart_grid benchmarks.charts benchmarks.report_figures=figures benchmarks.report_growth=growth
        benchmarks.report_routing=routing benchmarks.svg
    """,
    "benchmarks.results": "benchmarks.instruct_results=instruct benchmarks.result_parts=parts",
    "benchmarks.run": """
        benchmarks.evaluation benchmarks.experiment benchmarks.instruct benchmarks.pool_accuracy benchmarks.pool_of_run
        benchmarks.rows benchmarks.run_folder=session benchmarks.runner
    """,
    "benchmarks.streams": "benchmarks.augmentation benchmarks.datasets benchmarks.prepared benchmarks.tokenised",
    "index": "index.choice=contents index.index_files=files",
    "index.backends": "index.base index.exact index.faiss=_faiss index.flat index.hnsw index.ivf index.ivfpq",
    "language": "language_answers=model language_passes=model language_source=load language_tokens=tokens",
    "model": "alignment answers=predict heads model_files=files origins=state statistics",
    "parts": "parts.mixture=router parts.novelty=descriptors parts.retrieval=keys retrieval=keys",
    "pool": "pool.changes=edit pool.interchange=transfer pool.new_adapter=edit",
    "sites": """
        attention_sites=attention site_families=families site_families_timm=timm site_families_transformers=transformers
        site_families_vision=vision site_places=places
    """,
    "strategies": "strategies.expansion=base strategies.lifecycle=base strategies.lookup=base",
    "strategies._loop": """
        hidden_store=activation_cache strategies.experiences strategies.order strategies.views=activation_cache
    """,
}
"""New package (relative to ``cl_adapters``) to the old paths of its modules, with ``=`` where the name is new too."""

NEW_PLACES = {
    old: f"{package}.{new or old.rpartition('.')[2]}".lstrip(".")
    for package, words in _MOVED.items()
    for old, _, new in (word.partition("=") for word in words.split())
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
