"""What a strategy needs at its start to look inputs up: keys, and an inference rule that will find them."""

from __future__ import annotations

from cl_adapters.errors import ClAdaptersError, ConfigError
from cl_adapters.model.facade import AdapterModel
from cl_adapters.parts.keys import CLASS_KEYS, Keys, KeysConfig
from cl_adapters.predictors.base import Predictor


def begin_keys(model: AdapterModel, config: KeysConfig | None) -> None:
    """Give a model that has learned nothing its keys; check those of one that goes on.

    Raises:
        ConfigError: it has other keys.
        ClAdaptersError: it has learned classes without keys.
    """
    kept = dict(model.parts.items()).get(CLASS_KEYS)
    if isinstance(kept, Keys):
        kept.check_config(config)
    elif config is not None:
        if model.classes:
            raise ClAdaptersError(
                "this model learned classes without keys; keys have to be kept from the first task on"
            )
        model.parts[CLASS_KEYS] = Keys(config, model.backbone.num_features)


def usable(predictor: Predictor, model: AdapterModel) -> Predictor:
    """The predictor, if it will find the keys that it needs.

    Raises:
        ConfigError: the model keeps none.
    """
    if predictor.needs_keys and CLASS_KEYS not in model.parts:
        raise ConfigError(f"{predictor} looks inputs up by keys: pass keys='prototypes' (--keys prototypes) too")
    return predictor
