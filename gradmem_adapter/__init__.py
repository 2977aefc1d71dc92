"""GradMem for Hugging Face: write a context into a few vectors by gradient descent, then answer from them.

Importing this package makes "GRADMEM" a PEFT method (arXiv 2603.13875).
"""

from gradmem_adapter.model import Fidelity, GradMemModel
from gradmem_adapter.outputs import GradMemOutput, WriteProgress
from gradmem_adapter.registration import register

from .backbones import SMOLLM2, load_backbone
from .checkpoint import load_checkpoint, save_checkpoint
from .config import GradMemConfig
from .peft_model import GradMemPeftModel, get_peft_model
from .pipeline import GradMemPipeline
from .state import MemoryState, MemoryStateError
from .write.options import WriteOptions

__version__ = "0.1.0"

register()


__all__ = [
    "SMOLLM2",
    "Fidelity",
    "GradMemConfig",
    "GradMemModel",
    "GradMemOutput",
    "GradMemPeftModel",
    "GradMemPipeline",
    "MemoryState",
    "MemoryStateError",
    "WriteOptions",
    "WriteProgress",
    "__version__",
    "get_peft_model",
    "load_backbone",
    "load_checkpoint",
    "register",
    "save_checkpoint",
]
