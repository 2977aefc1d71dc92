"""What an adapter can be attached to."""

import pytest
from peft import get_peft_model
from tiny import tiny
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from gradmem_adapter import GradMemConfig


@pytest.mark.parametrize("kind", ["encoder-decoder", "masked", "not a decoder", "headless", "no transformer"])
def test_what_is_no_causal_lm_is_refused(kind):
    bert = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    model, message = {
        "encoder-decoder": lambda: (
            T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)),
            "encoder-decoder",
        ),
        "masked": lambda: (BertForMaskedLM(bert), "BertForMaskedLM"),
        "not a decoder": lambda: (BertLMHeadModel(bert), "both directions"),
        "headless": lambda: (LlamaModel(tiny().config), "no language-model head"),
        "no transformer": lambda: (nn.Sequential(nn.Linear(2, 2)), "causal language model of Transformers"),
    }[kind]()
    with pytest.raises(TypeError, match=message):
        get_peft_model(model, GradMemConfig())
