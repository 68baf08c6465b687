"""The adapter bank: T adapters on one backbone, and the routes that say which sample uses which."""

from cl_adapters.bank.bank import AdapterBank
from cl_adapters.bank.routes import BARE, Route, Routes

__all__ = ["BARE", "AdapterBank", "Route", "Routes"]
