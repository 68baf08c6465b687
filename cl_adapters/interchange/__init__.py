"""INTERCHANGE: adapters in the file formats of other libraries."""

from cl_adapters.interchange.peft_export import export_peft
from cl_adapters.interchange.peft_import import ImportedAdapter, import_peft

__all__ = ["ImportedAdapter", "export_peft", "import_peft"]
