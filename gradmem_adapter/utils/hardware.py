"""What the device has: free memory, and how much work fits into it."""

from __future__ import annotations

import psutil
import torch
from transformers import PreTrainedModel

from gradmem_adapter.utils.backbone import device_of

SATURATED = {"cuda": 16_384, "cpu": 2_048}
"""Padded tokens a batch beyond which a device gets no faster, only fuller."""

SHARE_OF_FREE_MEMORY = 0.6
"""What WRITE may fill of it."""


def token_budget(backbone: PreTrainedModel) -> int:
    """How many padded tokens to write at once, from the device's free memory.

    A frozen layer keeps about 16 hidden and 6 intermediate vectors of each token for WRITE's backward pass.

    Args:
        backbone (`PreTrainedModel`): the causal LM, on its device and in its type.

    Returns:
        `int`: at least 1, at most what saturates the device.
    """
    config, device = backbone.config.get_text_config(), device_of(backbone)
    hidden = config.hidden_size
    intermediate = getattr(config, "intermediate_size", None) or 4 * hidden
    bytes_per_token = (16 * hidden + 6 * intermediate) * backbone.dtype.itemsize * config.num_hidden_layers
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    else:
        free = psutil.virtual_memory().available
    fits = int(SHARE_OF_FREE_MEMORY * free / bytes_per_token)
    return max(1, min(fits, SATURATED.get(device.type, SATURATED["cpu"])))
