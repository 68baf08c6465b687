"""CONTINUAL INSTRUCTION TUNING, one file per method: a decoder learns task after task to answer prompts.

It does without Avalanche: an example is a prompt and its answer, and a task has no classes but a name.
"""

from cl_adapters.strategies.instruct.base import InstructConfig, InstructMethod, instruct_methods
from cl_adapters.strategies.instruct.tasks import Example, InstructTask

__all__ = ["Example", "InstructConfig", "InstructMethod", "InstructTask", "instruct_methods"]
