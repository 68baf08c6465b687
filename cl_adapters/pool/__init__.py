"""The adapter pool: adapters on disk, with what belongs to their classes. Opening one imports no torch."""

from cl_adapters.backbones.card import BackboneCard
from cl_adapters.pool.edit import NewAdapter
from cl_adapters.pool.manifest import Broken
from cl_adapters.pool.pool import AdapterPool
from cl_adapters.pool.record import PoolClass, Record
from cl_adapters.pool.verify import Verification

__all__ = ["AdapterPool", "BackboneCard", "Broken", "NewAdapter", "PoolClass", "Record", "Verification"]
