"""LanguageModel: a frozen causal language model that answers prompts with adapters, one per task.

Its encoder is that of a :class:`FrozenBackbone`, so the hooks of a bank act in ``generate`` too, and its tasks are the
classes of an :class:`AdapterModel`: keys, predictors, saved models, pools and indexes are those of images.

B prompts, D width of the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_adapters.adapters.base import AdapterType
from cl_adapters.backbones.frozen import FrozenBackbone
from cl_adapters.backbones.hf_forward import Pooling
from cl_adapters.bank.bank import AdapterBank
from cl_adapters.bank.routes import Route
from cl_adapters.errors import ClAdaptersError, DataError
from cl_adapters.language.answers import BATCH, Answering
from cl_adapters.language.load import open_language_model
from cl_adapters.language.routes import summed
from cl_adapters.model.facade import AdapterModel
from cl_adapters.model.predict import text_preprocessing
from cl_adapters.parts.keys import CLASS_KEYS, Keys, KeysConfig, Kind, keys_of
from cl_adapters.predictors.base import Predictor
from cl_adapters.predictors.nearest_key import NearestKey

if TYPE_CHECKING:
    from cl_adapters.index.index import AdapterIndex
    from cl_adapters.pool import AdapterPool


class LanguageModel(Answering):
    """A causal language model with adapters; only they are ever trained.

    Args:
        lm: of transformers, whose encoder is that of ``model.backbone``.
        model: the encoder with a bank of adapters; its classes are the tasks.
    """

    @classmethod
    def load(
        cls,
        name: str,
        *,
        adapter: AdapterType | None = None,
        blocks: Sequence[int] | None = None,
        keys: KeysConfig | Kind = "prototypes",
        pooling: Pooling | None = None,
        max_length: int | None = None,
        dtype: str | None = None,
        quantization: str | None = None,
    ) -> LanguageModel:
        """Load a language model without any task yet.

        Args:
            name: "hf:" and a folder or hub name of a decoder.
            adapter: type of the adapters of all tasks; None: there will be none.
            blocks: that get adapters; default all.
            keys: what is kept of each task's prompts, to find the adapter for a prompt.
            pooling: of the features behind the keys; see :meth:`FrozenBackbone.load`, as the rest.
            max_length: tokens of prompt and answer together.
            dtype: of the frozen weights.
            quantization: of the frozen encoder.

        Raises:
            BackboneUnavailable: the files, or a package, cannot be had here.
            IncompatibleBackbone: no decoder, or one without sites for such adapters.
            ConfigError: an option that this model does not have.
        """
        backbone = FrozenBackbone.load(
            name, pooling=pooling, max_length=max_length, dtype=dtype, quantization=quantization
        )
        lm = open_language_model(backbone)
        model = AdapterModel(backbone, None if adapter is None else AdapterBank(backbone, adapter, blocks))
        model.parts[CLASS_KEYS] = Keys(KeysConfig.of(keys), backbone.num_features)
        model.predictor = NearestKey()
        return cls(lm, model)

    @classmethod
    def of(cls, model: AdapterModel) -> LanguageModel:
        """Put the head on a model that was loaded from a folder or a pool.

        Raises:
            ConfigError: its backbone was not loaded from transformers.
            IncompatibleBackbone: the backbone is no decoder.
        """
        return cls(open_language_model(model.backbone), model)

    @classmethod
    def from_pool(
        cls,
        pool: AdapterPool | str | Path,
        ids: Sequence[str] | None = None,
        *,
        predictor: Predictor | None = None,
        index: AdapterIndex | str | Path | None = None,
        limit: int = 64,
    ) -> LanguageModel:
        """A language model of a pool's adapters; see :meth:`AdapterModel.from_pool`."""
        return cls.of(AdapterModel.from_pool(pool, ids, predictor=predictor, index=index, limit=limit))

    @property
    def bank(self) -> AdapterBank:
        """The adapters.

        Raises:
            ClAdaptersError: it was loaded without any.
        """
        if self.model.bank is None:
            raise ClAdaptersError("this language model has no adapters: load it with adapter=...")
        return self.model.bank

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks so far."""
        return [self.model.name_of(label) for label in self.model.classes]

    def train(self, mode: bool = True) -> LanguageModel:
        """Stay in evaluation mode: dropout of adapters follows the generator that is handed over, nothing else."""
        return super().train(False)

    # --- tasks ---------------------------------------------------------------------------------------------------

    def add_task(self, name: str, generator: torch.Generator | None = None) -> int:
        """Begin a task: a class of that name, and with a ``generator`` a fresh adapter that can be trained.

        Returns:
            The newest adapter's slot, -1 where there is none yet.

        Raises:
            DataError: a task of that name is there already.
        """
        if name in self.tasks:
            raise DataError(f"there is a task {name!r} already; each has a name of its own")
        label = max(self.model.classes, default=-1) + 1
        self.model.add_task([label])
        self.model.class_names[label] = name
        if generator is not None:
            self.bank.add_slot(self.bank.fresh(generator))
        self.model.date_slots(self.model.num_tasks - 1)
        return self.model.num_slots - 1

    def finish_task(self, prompts: Sequence[str], generator: torch.Generator) -> None:
        """Freeze all adapters, and take the keys of the newest task from its prompts.

        Args:
            prompts: of training.
            generator: of what becomes a key.

        Raises:
            DataError: no prompt.
        """
        for slot in range(self.model.num_slots):
            self.bank.freeze(slot)
        self.model.part(CLASS_KEYS, Keys).add_class(self.features(prompts), generator)

    def features(self, prompts: Sequence[str], batch: int = BATCH) -> Tensor:
        """Features of prompts under the bare backbone, float32 [B, D]: what keys and indexes hold."""
        preprocessing = text_preprocessing(self.model.backbone)
        with torch.no_grad():
            parts = [
                self.model.features(preprocessing.encode(prompts[start : start + batch]).to(self.device), None).float()
                for start in range(0, len(prompts), batch)
            ]
        return torch.cat(parts) if parts else torch.empty(0, self.model.backbone.num_features)

    def route_of(self, prompts: Sequence[str]) -> Route:
        """The adapter of the task whose key is nearest to each prompt; all of them where the model sums them.

        Raises:
            ClAdaptersError: no task was finished yet.
        """
        if self.model.predictor.sums and self.model.num_slots:
            return summed(range(self.model.num_slots), len(prompts), self.device)
        return Route.hard(self.model.slot_of_column[self._nearest(prompts)].to(self.device))

    def task_of(self, prompts: Sequence[str]) -> list[str]:
        """The name of the task whose key is nearest to each prompt.

        Raises:
            ClAdaptersError: no task was finished yet.
        """
        names = self.tasks
        return [names[column] for column in self._nearest(prompts).tolist()]

    def _nearest(self, prompts: Sequence[str]) -> Tensor:
        """Column of the nearest task, int64 [B] on the CPU."""
        return keys_of(self.model).nearest(self.features(prompts), 1)[1][:, 0].cpu()
