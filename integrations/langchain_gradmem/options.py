"""Options that a chat model and each of its calls accept, with the same validation."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class CallOptions(BaseModel):
    """How one call is answered; the fields are those of `ChatGradMem`, which explains them."""

    max_tokens: int = Field(default=256, ge=1, strict=True)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False, strict=True)
    top_p: float | None = Field(default=None, gt=0, le=1, strict=True)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**64, strict=True)  # the range that PyTorch accepts
    stop: list[str] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    model_config = ConfigDict(title="ChatGradMem")
