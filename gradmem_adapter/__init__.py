"""GradMem for Hugging Face: write a context into a few vectors by gradient descent, then answer from them.

Importing this package makes "GRADMEM" a PEFT method (arXiv 2603.13875).
"""

import warnings

from gradmem_adapter import compat
from gradmem_adapter.backbones import SMOLLM2, load_backbone
from gradmem_adapter.card import Card
from gradmem_adapter.checkpoint import load_checkpoint, save_checkpoint
from gradmem_adapter.config import GradMemConfig
from gradmem_adapter.documents import DocumentMemory
from gradmem_adapter.hub import push_to_hub
from gradmem_adapter.model import GradMemModel
from gradmem_adapter.outputs import Fidelity, GradMemOutput, ScoredText, SurestAnswer, WriteProgress
from gradmem_adapter.peft_model import GradMemPeftModel, get_peft_model
from gradmem_adapter.pipeline import GradMemPipeline
from gradmem_adapter.read.reader import Reader
from gradmem_adapter.registration import register
from gradmem_adapter.segments import Segment
from gradmem_adapter.state import MemoryState, MemoryStateError
from gradmem_adapter.store import MemoryStore, MemoryStoreError, UnknownStateError
from gradmem_adapter.support import Selected
from gradmem_adapter.tuner import AdapterChangedError
from gradmem_adapter.write.options import Study, WriteOptions

__version__ = "0.1.0"

register()
# PEFT reads a deprecated attribute of every Transformers model; users cannot do anything about this warning.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)


__all__ = [
    "SMOLLM2",
    "AdapterChangedError",
    "Card",
    "DocumentMemory",
    "Fidelity",
    "GradMemConfig",
    "GradMemModel",
    "GradMemOutput",
    "GradMemPeftModel",
    "GradMemPipeline",
    "MemoryState",
    "MemoryStateError",
    "MemoryStore",
    "MemoryStoreError",
    "Reader",
    "ScoredText",
    "Segment",
    "Selected",
    "Study",
    "SurestAnswer",
    "UnknownStateError",
    "WriteOptions",
    "WriteProgress",
    "__version__",
    "compat",
    "get_peft_model",
    "load_backbone",
    "load_checkpoint",
    "push_to_hub",
    "register",
    "save_checkpoint",
]
