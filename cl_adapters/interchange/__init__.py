"""INTERCHANGE: adapters in the file formats of other libraries."""

from cl_adapters.interchange.peft_export import export_peft
from cl_adapters.interchange.peft_import import ImportedAdapter, import_peft
from cl_adapters.interchange.peft_options import LoRAOptions, lora_from_peft

__all__ = ["ImportedAdapter", "LoRAOptions", "export_peft", "import_peft", "lora_from_peft"]
