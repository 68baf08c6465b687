"""Keys: what the classes look like to the bare backbone, to find the adapter for an input without any training.

What the predictors share that look an input up among keys stands at the end.

B batch, C classes, D width of the features, M keys, H held-out features, K keys that are found, T owners (adapters).
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_adapters.config import build, to_plain
from cl_adapters.errors import ClAdaptersError, ConfigError, DataError
from cl_adapters.model.state import ModelState
from cl_adapters.parts.base import Part, parts

CLASS_KEYS = "class_keys"
"""Name of the keys among a model's parts, also on disk."""

Kind = Literal["prototypes", "centroids", "features"]
DEFAULT_CENTROIDS = 4
ROUNDS = 25
"""Of k-means, at most."""
TEMPERATURE = 0.07
"""By which cosines are divided before a softmax (Wu et al. 2018)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KeysConfig:
    """What is kept of each class.

    Attributes:
        kind: "prototypes" (the mean feature), "centroids" (of k-means) or "features" (of the images themselves); for a
            class that returns in later tasks, those of each of them.
        per_class: centroids (default 4), or features drawn without replacement (default all) per class.
        held_out: share of each class's images that becomes no key, for calibrating a threshold
            (:mod:`cl_adapters.openset`); rounded down, so small classes may give none.
    """

    kind: Kind = "prototypes"
    per_class: int | None = None
    held_out: float = 0.2

    def __post_init__(self) -> None:
        if self.per_class is not None and (self.per_class < 1 or self.kind == "prototypes"):
            raise ValueError(
                f"per_class is the number of centroids or features per class, at least 1; got {self.per_class} for "
                f"{self.kind}"
            )
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must be in [0, 1), got {self.held_out}")

    @classmethod
    def of(cls, value: KeysConfig | Kind) -> KeysConfig:
        """A configuration, or the default one of a kind by its name.

        Raises:
            ConfigError: no such kind.
        """
        return value if isinstance(value, KeysConfig) else build(cls, {"kind": value}, "keys")


class KeyLookup(ABC):
    """What predictors and abstention ask of a model's keys: the scores of the nearest, higher is nearer.

    :class:`Keys` compares with every key. A model of a pool may have an index in its place, which is no part that is
    saved (:mod:`cl_adapters.pool.indexed_keys`).
    """

    @property
    def metric(self) -> str:
        """What the scores are."""
        return "cosine"

    @abstractmethod
    def nearest(self, f_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest keys, best first.

        Args:
            f_BD: features under the bare backbone.
            k: at least 1.

        Returns:
            Scores float32 and class columns int64, both [B, K], K at most k. Where fewer are found, a row ends with
            minus infinity and any column.
        """

    @abstractmethod
    def class_scores(self, f_BD: Tensor, classes: int | None = None) -> Tensor:
        """Score of the nearest key of each class.

        Args:
            f_BD: features under the bare backbone.
            classes: number of columns; those without a key, and those that were not looked at since many others are
                nearer, get minus infinity. Default C.

        Returns:
            float32 [B, C].
        """

    @abstractmethod
    def owner_scores(self, f_BD: Tensor, owner_C: Tensor, owners: int, k: int) -> Tensor:
        """Score of the nearest key of each owner of classes.

        Args:
            f_BD: features under the bare backbone.
            owner_C: int64 [C], the owner of each class, in [0, ``owners``).
            owners: T.
            k: at least the scores of the k nearest owners are wanted.

        Returns:
            float32 [B, T]; minus infinity for owners without a key, and perhaps for those beyond the k nearest.
        """

    @abstractmethod
    def means(self) -> Tensor:
        """Mean of what each class's keys stand for, float32 [C, D]."""


def class_means(keys_MD: Tensor, column_M: Tensor, classes: int, size_M: Tensor | None = None) -> Tensor:
    """Mean of each class's keys, float32 [C, D], a key counting as often as ``size_M`` says; None: all alike."""
    sums_CD = keys_MD.new_zeros(classes, keys_MD.shape[1])
    if size_M is None:
        count_C = column_M.bincount(minlength=classes).clamp_min(1)
        return sums_CD.index_add(0, column_M, keys_MD) / count_C[:, None]
    total_C = size_M.new_zeros(classes).index_add(0, column_M, size_M)
    return sums_CD.index_add(0, column_M, keys_MD * (size_M / total_C[column_M])[:, None])


def best_of_owners(scores_BK: Tensor, owner_BK: Tensor, owners: int) -> Tensor:
    """The largest score [B, T] of each owner (int64 in [0, T)); minus infinity for those without one."""
    none_BT = scores_BK.new_full((len(scores_BK), owners), -torch.inf)
    return none_BT.scatter_reduce(1, owner_BK.expand_as(scores_BK), scores_BK, "amax")


@parts.register("keys")
class Keys(Part, KeyLookup):
    """Keys of the classes learned so far, under the bare backbone; cosine similarity to them.

    Args:
        config: what is kept.
        width: D.

    Attributes:
        keys_MD: float32 [M, D], not normalised.
        column_M: int64 [M], class column of each key.
        size_M: int64 [M], how many features each centroid is the mean of; None: other keys, or centroids of a release
            that did not keep it, which all count alike.
        held_out_HD: float32 [H, D], features of training images that became no key.
        held_out_column_H: int64 [H], their class columns.
    """

    floats = ("keys_MD", "held_out_HD")

    keys_MD: Tensor
    column_M: Tensor
    size_M: Tensor | None
    held_out_HD: Tensor
    held_out_column_H: Tensor

    def __init__(self, config: KeysConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("keys_MD", torch.empty(0, width))
        self.register_buffer("column_M", torch.empty(0, dtype=torch.long))
        self.register_buffer("size_M", torch.empty(0, dtype=torch.long) if config.kind == "centroids" else None)
        self.register_buffer("held_out_HD", torch.empty(0, width))
        self.register_buffer("held_out_column_H", torch.empty(0, dtype=torch.long))

    @property
    def num_classes(self) -> int:
        """Classes C so far."""
        return int(self.column_M.max()) + 1 if len(self.column_M) else 0

    def similarity(self, f_BD: Tensor) -> Tensor:
        """Cosine of features [B, D] to every key, float32 [B, M] in [-1, 1]."""
        self._check_any()
        return F.normalize(f_BD.float(), dim=1) @ F.normalize(self.keys_MD, dim=1).T

    def nearest(self, f_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Cosines to the k nearest keys and their class columns; all keys where there are fewer."""
        near_BM = self.similarity(f_BD)
        best_BK = near_BM.topk(min(k, near_BM.shape[1]), dim=1)
        return best_BK.values, self.column_M[best_BK.indices]

    def class_scores(self, f_BD: Tensor, classes: int | None = None) -> Tensor:
        """Cosine to the nearest key of each class; minus infinity only for classes without a key."""
        return best_of_owners(self.similarity(f_BD), self.column_M, classes or self.num_classes)

    def owner_scores(self, f_BD: Tensor, owner_C: Tensor, owners: int, k: int) -> Tensor:
        """Cosine to the nearest key of every owner."""
        return best_of_owners(self.class_scores(f_BD, len(owner_C)), owner_C, owners)

    def means(self) -> Tensor:
        """Mean of what each class's keys stand for, float32 [C, D]."""
        self._check_any()
        return class_means(self.keys_MD, self.column_M, self.num_classes, self.size_M)

    @torch.no_grad()
    def add_class(self, f_ND: Tensor, generator: torch.Generator, column: int | None = None) -> None:
        """Take a class from the features of its training images under the bare backbone.

        Args:
            f_ND: float32 [N, D].
            generator: of what is held out, drawn, and where k-means starts.
            column: of the class; one that has keys already gets these beside them. Default the next one.

        Raises:
            DataError: no feature.
        """
        if not len(f_ND):
            raise DataError("a class without training images has no keys")
        column, config = self.num_classes if column is None else column, self.config
        order_N = torch.randperm(len(f_ND), generator=generator)
        held = int(config.held_out * len(f_ND))
        kept_ND = f_ND[order_N[held:].sort().values]
        if config.kind == "prototypes":
            new_KD = kept_ND.mean(0, keepdim=True)
        elif config.kind == "centroids":
            new_KD, size_K = _clustered(kept_ND, config.per_class or DEFAULT_CENTROIDS, generator)
            if self.size_M is not None:
                self.size_M = torch.cat([self.size_M, size_K.to(self.size_M)])
        else:
            new_KD = kept_ND[torch.randperm(len(kept_ND), generator=generator)[: config.per_class].sort().values]
        self._append("keys_MD", "column_M", new_KD, column)
        self._append("held_out_HD", "held_out_column_H", f_ND[order_N[:held].sort().values], column)

    def description(self) -> dict[str, Any]:
        """What is kept."""
        return {"config": to_plain(self.config)}

    def check(self, classes: int, width: int) -> None:
        """Check shapes and columns too."""
        super().check(classes, width)
        for rows, columns in ((self.keys_MD, self.column_M), (self.held_out_HD, self.held_out_column_H)):
            known = columns.dtype == torch.long and all(0 <= column < classes for column in columns.unique().tolist())
            if tuple(rows.shape) != (len(columns), width) or not known:
                raise DataError(f"keys {list(rows.shape)} do not fit {classes} classes of width {width}")

    @classmethod
    def restore(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Keys:
        """The same keys."""
        made = cls(build(KeysConfig, description["config"], "keys"), tensors["keys_MD"].shape[1])
        made.size_M = tensors.get("size_M")
        for name, _ in made.named_buffers():
            setattr(made, name, tensors[name])
        return made

    def check_config(self, config: KeysConfig | None) -> None:
        """Check that these keys can go on as somebody wants them; None wants nothing in particular.

        Raises:
            ConfigError: others were begun.
        """
        if config is not None and config != self.config:
            raise ConfigError(f"this model keeps {self.config}, which cannot become {config}; leave keys out")

    def _append(self, rows: str, columns: str, new_KD: Tensor, column: int) -> None:
        before_MD, before_M = getattr(self, rows), getattr(self, columns)
        setattr(self, rows, torch.cat([before_MD, new_KD.to(before_MD)]))
        setattr(self, columns, torch.cat([before_M, before_M.new_full((len(new_KD),), column)]))

    def _check_any(self) -> None:
        if not len(self.keys_MD):
            raise ClAdaptersError("there are no keys yet: train with keys=..., so that they are taken after every task")


def centroids(f_ND: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Centroids of k-means (Lloyd), begun as k-means++ (Arthur and Vassilvitskii 2007).

    Args:
        f_ND: features float32 [N, D].
        k: how many; at most N are made.
        generator: of the beginning.

    Returns:
        float32 [min(k, N), D]. Fewer where features repeat; empty clusters are left out.
    """
    return _clustered(f_ND, k, generator)[0]


def _clustered(f_ND: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """:func:`centroids`, and how many features each is the mean of, int64 [K]."""
    if len(f_ND) <= k:
        return f_ND, torch.ones(len(f_ND), dtype=torch.long)
    chosen = [int(torch.randint(len(f_ND), (1,), generator=generator))]
    while len(chosen) < k:
        far_N = torch.cdist(f_ND, f_ND[chosen]).amin(1).square()
        if not far_N.any():
            break
        chosen.append(int(torch.multinomial(far_N, 1, generator=generator)))
    centres_KD = f_ND[chosen]
    of_N = torch.full((len(f_ND),), -1)
    for _ in range(ROUNDS):
        nearest_N = torch.cdist(f_ND, centres_KD).argmin(1)
        if torch.equal(nearest_N, of_N):
            break
        of_N = nearest_N
        sizes_K = of_N.bincount(minlength=len(centres_KD))
        sums_KD = torch.zeros_like(centres_KD).index_add(0, of_N, f_ND)
        filled = sizes_K > 0
        centres_KD = sums_KD[filled] / sizes_K[filled, None]
        of_N = filled.cumsum(0)[of_N] - 1  # numbers of the clusters that are left
    return centres_KD, of_N.bincount(minlength=len(centres_KD))


def keys_of(model: ModelState) -> KeyLookup:
    """The model's keys, or the index that stands in their place.

    Raises:
        ClAdaptersError: it has none; says how to get them.
    """
    found: object = dict(model.parts.items()).get(CLASS_KEYS)
    if not isinstance(found, KeyLookup):
        raise ClAdaptersError(
            "this model has no keys to look inputs up by: train it with keys='prototypes' (or 'centroids', 'features')"
        )
    return found


def check_own_keys(model: ModelState) -> None:
    """Check that a model's keys can be saved with it.

    Raises:
        ClAdaptersError: an index stands in their place.
    """
    if CLASS_KEYS in model.parts and not isinstance(model.parts[CLASS_KEYS], Part):
        raise ClAdaptersError(
            "this model looks inputs up in an index beside its pool, so it cannot be saved apart from them: keep the "
            "pool and use AdapterModel.from_pool(pool, index=...), or make the model without index= and save that"
        )


def check_neighbours(k: int, temperature: float) -> None:
    """Check the options of a predictor that weighs its k nearest.

    Raises:
        ValueError: k below 1, or a temperature that is not positive.
    """
    if k < 1 or not 0 < temperature < float("inf"):
        raise ValueError(f"k must be at least 1 and temperature positive, got k={k}, temperature={temperature}")


def weights_of(scores_BK: Tensor, keys: KeyLookup, temperature: float) -> Tensor:
    """Softmax [B, K] of scores / temperature; 0 where there is no score.

    Raises:
        ConfigError: the default temperature, with scores of an index that are no cosines: squared distances or inner
            products are so much larger that the nearest would have all the weight.
    """
    if keys.metric != "cosine" and temperature == TEMPERATURE and scores_BK.shape[1] > 1:
        raise ConfigError(
            f"temperature {temperature} is for cosines, but the index scores by {keys.metric!r}: give this predictor a "
            "temperature of about the difference that counts between two scores, or take an index with metric='cosine'"
        )
    return (scores_BK / temperature).softmax(1)


def answered(model: ModelState, f_BD: Tensor, bare_BD: Tensor) -> Tensor:
    """Logits [B, C] of the linear head on the adapted features; without such a head, scores of the classes' keys.

    Some strategies (SimpleCIL, RanPAC) train no linear head of all classes; those scores are under the bare backbone.
    """
    classes = len(model.classes)
    if model.head.num_classes == classes:
        logits_BC: Tensor = model.head(f_BD)
        return logits_BC
    return keys_of(model).class_scores(bare_BD, classes)
