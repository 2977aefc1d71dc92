import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # for `tiny`, and `benchmarks`


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


_WORDS = ["<unk>", "</s>", "the", "heron", "reached", "an", "island"]


@pytest.fixture
def llama_directory(tmp_path):
    """A tiny random Llama and a word tokenizer without a pad token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(_WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=1,
    )
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    path = tmp_path / "tiny"
    LlamaForCausalLM(config).save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(path)
    return path
