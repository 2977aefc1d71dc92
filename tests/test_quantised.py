"""Quantised backbones. The libraries are not dependencies: without one of them its tests are skipped."""

import sys

import pytest
import torch
import transformers
from adapters import lora
from peft import get_peft_model
from tiny import tiny, tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from gradmem_adapter import GradMemConfig


def nf4():
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def bitsandbytes_int8():
    pytest.importorskip("bitsandbytes")
    return transformers.BitsAndBytesConfig(load_in_8bit=True)


def torchao_int8():
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig())


def torchao_float8():
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Float8WeightOnlyConfig())


def quanto():
    pytest.importorskip("optimum.quanto")
    return transformers.QuantoConfig(weights="int8")


def torchao_int8_activations():
    quantization = pytest.importorskip("torchao.quantization")
    return transformers.TorchAoConfig(quantization.Int8DynamicActivationInt8WeightConfig())


KINDS = [nf4, bitsandbytes_int8, torchao_int8, torchao_float8, quanto]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def load(kind, tmp_path):
    """Opens the same backbone any number of times."""
    config = kind()
    tiny(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    return lambda: AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.float32
    ).eval()


def attached(backbone, **options):
    options |= {"num_memory_tokens": 3, "write_steps": 2, "write_lr": 0.3, "memory_init_std": 0.5}
    return get_peft_model(backbone, GradMemConfig(**options)).eval()


def by_definition(backbone, memory, ids):
    """Two steps of plain autograd, with nothing of this package."""
    embeddings = backbone.get_input_embeddings()(ids)
    for _ in range(2):
        memory = memory.detach().requires_grad_()
        logits = backbone(inputs_embeds=torch.cat([memory, embeddings], dim=1)).logits[:, 2:-1]
        loss = F.cross_entropy(logits.transpose(1, 2).float(), ids, reduction="none").mean(1).sum()
        memory = memory - 0.3 * torch.autograd.grad(loss, memory)[0]
    return memory.detach()


def test_every_write_is_right_and_leaves_the_model_unchanged(load, kind):
    """bitsandbytes' 4-bit layers had no gradients on a CPU after their first pass without."""
    contexts, queries = tokens(2, 9), tokens(2, 5, seed=1)
    model, plain = attached(load()), load().train(kind is nf4)  # in training mode it packs nothing
    start = model.base_model.slots.gradmem_memory["default"].detach().expand(2, -1, -1)
    with torch.no_grad():
        model(contexts)
    expected = by_definition(plain, start, contexts)
    for _ in range(2):
        state = model.write(contexts)
        torch.testing.assert_close(state.vectors, expected, atol=1e-5, rtol=1e-4)
    prefix = torch.cat([expected, plain.get_input_embeddings()(queries)], dim=1)
    logits = model(input_ids=queries, memory=state).logits
    torch.testing.assert_close(logits, plain(inputs_embeds=prefix).logits[:, 3:], atol=1e-3, rtol=1e-3)
    assert model.generate(queries, memory=state, max_new_tokens=3).shape == (2, 8)


def test_outer_gradients_match_the_textbook(load):
    contexts, queries = tokens(2, 9), tokens(2, 5, seed=1)
    backbone = load()
    model = attached(backbone, lora_config=lora(target_modules=["q_proj", "down_proj"]), meta_gradient="first_order")
    loss = model(input_ids=queries, labels=queries, context_input_ids=contexts).loss
    loss.backward()
    slots = model.base_model.slots.gradmem_memory["default"]
    state = by_definition(backbone, slots.expand(2, -1, -1), contexts).requires_grad_()
    lora_weights = [p for name, p in backbone.named_parameters() if "lora" in name]
    prefix = torch.cat([state, backbone.get_input_embeddings()(queries)], dim=1)
    expected = F.cross_entropy(backbone(inputs_embeds=prefix).logits[:, 2:-1].transpose(1, 2), queries)
    of_state, *gradients = torch.autograd.grad(expected, [state, *lora_weights])
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    found = [slots.grad, *(p.grad for p in lora_weights)]
    for one, other in zip(found, [of_state.sum(0), *gradients], strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_weights_packed_for_a_cpu_are_refused(load, kind):
    if kind is not nf4 or not sys.modules["bitsandbytes"].functional.has_avx512bf16():
        pytest.skip("bitsandbytes packs 4-bit weights, and for CPUs that compute in bf16")
    backbone = load()
    with torch.no_grad():
        backbone(tokens(1, 4))
    with pytest.raises(ValueError, match=r"packed for this CPU.*attach the adapter before its first pass"):
        attached(backbone)


@pytest.mark.parametrize("kind", [torchao_int8_activations])
def test_layers_without_gradients_are_refused(load):
    with pytest.raises(ValueError, match=r"passes no gradients.*Quantise only weights"):
        attached(load())


def test_the_fingerprint_depends_on_quantised_weights(load):
    backbone = load()
    model = attached(backbone)
    before, weight = model.fingerprint(), backbone.model.layers[1].mlp.up_proj.weight
    names = weight.__tensor_flatten__()[0] if hasattr(weight, "__tensor_flatten__") else []
    inner = getattr(weight, names[0]) if names else weight
    with torch.no_grad():
        inner.data.copy_(inner.data.flip(0))
    assert model.fingerprint() != before
