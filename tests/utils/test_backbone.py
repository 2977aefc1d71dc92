"""What an adapter can be attached to."""

import pytest
from peft import LoraConfig, get_peft_model
from tiny import tiny, tokens
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    LlamaModel,
    RemBertConfig,
    RemBertForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from gradmem_adapter import GradMemConfig


@pytest.mark.parametrize("kind", ["encoder-decoder", "masked", "not a decoder", "headless", "no transformer"])
def test_models_that_are_not_causal_lms_are_refused(kind):
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


@pytest.mark.parametrize("how", ["by PEFT", "by Transformers"])
def test_a_backbone_that_already_has_an_adapter_is_refused(how):
    """PEFT would treat both as adapters of one method."""
    lora, backbone = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"), tiny()
    if how == "by PEFT":
        get_peft_model(backbone, lora, adapter_name="style")
    else:
        backbone.add_adapter(lora, adapter_name="style")
    with pytest.raises(ValueError, match=r"already has an adapter \(style\).*merge_and_unload"):
        get_peft_model(backbone, GradMemConfig())


def test_the_error_for_a_second_gradmem_adapter_says_what_to_do():
    """As when a notebook cell is run again with other settings."""
    backbone, lora = tiny(), LoraConfig(r=2, target_modules=["q_proj"])
    model = get_peft_model(backbone, GradMemConfig(lora_config=lora))
    with pytest.raises(ValueError, match=r"load the backbone again, or use the model that model\.unload\(\) returns"):
        get_peft_model(backbone, GradMemConfig(num_memory_tokens=3))
    again = get_peft_model(model.unload(), GradMemConfig(num_memory_tokens=3, lora_config=lora))
    assert again.write(tokens(1, 5)).vectors.shape[1] == 3


@pytest.mark.parametrize("start", ["context", "pooled_context"])
def test_a_start_from_hidden_states_of_another_width_is_refused(start):
    config = RemBertConfig(
        vocab_size=20, hidden_size=8, input_embedding_size=4, output_embedding_size=4, num_hidden_layers=1,
        num_attention_heads=1, intermediate_size=8, is_decoder=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="width 8 and input embeddings have width 4"):
        get_peft_model(RemBertForCausalLM(config), GradMemConfig(start=start))
    state = get_peft_model(RemBertForCausalLM(config), GradMemConfig()).eval().write(tokens(1, 5) % 20)
    assert state.width == 4


def test_a_position_limit_of_minus_one_means_none():
    backbone = tiny()
    backbone.config.max_position_embeddings = -1
    assert get_peft_model(backbone, GradMemConfig()).positions is None
