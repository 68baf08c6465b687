"""AdapterModel: the front door. Train one with a strategy, then save, load, predict; or make one from a pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.model.classifier import Classifier
from cl_adapters.model.files import load_model, save_model
from cl_adapters.model.predict import Answer, answer_files, answer_texts
from cl_adapters.predictors.base import Predictor

if TYPE_CHECKING:
    from cl_adapters.index.index import AdapterIndex
    from cl_adapters.pool.pool import AdapterPool

__all__ = ["AdapterModel", "Answer"]

M = TypeVar("M", bound="AdapterModel")


class AdapterModel(Classifier):
    """A continually trained classifier: backbone, adapters, heads and predictor, with its files and pools.

    What it holds is described at :class:`~cl_adapters.model.state.ModelState`, how it answers at
    :class:`~cl_adapters.model.classifier.Classifier`.
    """

    def predict_files(
        self, files: Sequence[str | Path], batch: int = 64, *, predictor: Predictor | None = None
    ) -> list[Answer]:
        """Classify image files, ``batch`` at a time, by the model's predictor or another ``predictor``.

        Raises:
            ConfigError: ``batch`` is less than 1.
            DataError: a file that is no readable image, by name; or one file instead of a list.
            ClAdaptersError: the backbone takes no images.
        """
        return answer_files(self, files, batch, predictor)

    def predict_texts(
        self, texts: Sequence[str], batch: int = 64, *, predictor: Predictor | None = None
    ) -> list[Answer]:
        """Classify texts, ``batch`` of similar length at a time; the answers are in the order of the texts.

        Raises:
            ConfigError: ``batch`` is less than 1.
            ClAdaptersError: the backbone takes no texts.
        """
        return answer_texts(self, texts, batch, predictor)

    def save(self, path: str | Path, *, overwrite: bool = False, link_from: str | Path | None = None) -> Path:
        """Write the model (without the backbone's weights) as a folder, atomically; see ``model_files``.

        Args:
            path: folder to make.
            overwrite: replace a saved model, or an empty folder; nothing else is ever replaced.
            link_from: an earlier save of the same model; unchanged files are hard-linked.

        Raises:
            StorageError: the place exists or cannot be written, or a number of the model is not finite.
        """
        link = None if link_from is None else Path(link_from)
        return save_model(self, Path(path), overwrite=overwrite, link_from=link)

    @classmethod
    def load(cls: type[M], path: str | Path, backbone: FrozenBackbone | None = None, device: str = "cpu") -> M:
        """Read a folder of :meth:`save`; without a ``backbone`` the recorded one is loaded again by name.

        Raises:
            StorageError: missing, altered or newer files.
            IncompatibleBackbone: not the backbone that the adapters were trained on.
        """
        return load_model(cls, Path(path), backbone).to(device)

    def save_pool(
        self,
        path: str | Path,
        *,
        tags: Sequence[str] = (),
        benchmark: str | None = None,
        metrics: Mapping[int, Mapping[str, float]] | None = None,
        compression: str | None = None,
    ) -> AdapterPool:
        """Write the model as a pool with one record per adapter; see :func:`cl_adapters.pool.models.save_pool`."""
        from cl_adapters.pool.models import save_pool

        return save_pool(self, Path(path), tags=tags, benchmark=benchmark, metrics=metrics, compression=compression)

    @classmethod
    def from_pool(
        cls: type[M],
        pool: AdapterPool | str | Path,
        ids: Sequence[str] | None = None,
        *,
        backbone: FrozenBackbone | None = None,
        predictor: Predictor | None = None,
        index: AdapterIndex | str | Path | None = None,
        limit: int = 64,
        device: str = "cpu",
    ) -> M:
        """A model of a pool's adapters, which are loaded when used; see :func:`cl_adapters.pool.models.from_pool`."""
        from cl_adapters.pool.models import from_pool

        made = from_pool(cls, pool, ids, backbone=backbone, predictor=predictor, index=index, limit=limit)
        return made.to(device)
