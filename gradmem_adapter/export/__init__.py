"""Export an adapter and its memory states for other engines, and read memory with these engines."""

from gradmem_adapter.export.huggingface import GGUF_TYPES, export_model
from gradmem_adapter.export.prompt_embeds import prompt_embeds

__all__ = ["GGUF_TYPES", "export_model", "prompt_embeds"]
