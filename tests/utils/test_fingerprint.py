"""The fingerprint follows what matters and nothing else."""

import copy
import gc
import weakref

import pytest
import torch
from adapters import lora, make
from peft import get_peft_model
from peft.helpers import rescale_adapter_scale
from tiny import tiny, tokens
from tiny_pipeline import tiny_pipeline
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from gradmem_adapter import GradMemConfig, MemoryStore
from gradmem_adapter.utils import fingerprint as fingerprint_module
from gradmem_adapter.utils.fingerprint import FingerprintCache, fingerprint


def test_the_fingerprint_depends_on_every_weight_that_matters():
    model = make(lora_config=lora(), train_backbone=True, write_head=True)
    seen = {model.fingerprint()}
    for name, parameter in model.named_parameters():
        if "layers.1" in name or "gradmem" in name:
            with torch.no_grad():
                parameter.flatten()[0].add_(0.1)
            seen.add(model.fingerprint())
            assert model.fingerprint() in seen
    changed = sum("layers.1" in name or "gradmem" in name for name, _ in model.named_parameters())
    assert len(seen) == changed + 1


def test_the_fingerprint_ignores_what_does_not_matter():
    model = make()
    before = model.fingerprint()
    config = model.peft_config["default"]
    config.write_steps, config.write_lr, config.inference_mode = 7, 0.1, True
    model.train()
    assert model.fingerprint() == before
    rounded = tiny().bfloat16()
    prints = []
    for backbone in (copy.deepcopy(rounded), copy.deepcopy(rounded).float()):
        torch.manual_seed(1)
        prints.append(get_peft_model(backbone, GradMemConfig(num_memory_tokens=2)).fingerprint())
    assert prints[0] == prints[1]


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 500_000.0}, {"rms_norm_eps": 1e-5}, {"hidden_act": "gelu"}, {"num_attention_heads": 2}],
    ids=lambda change: next(iter(change)),
)
def test_the_fingerprint_depends_on_how_weights_are_used(change):
    """No tensor reveals these fields; head counts keep every shape if `head_dim` makes up for them."""
    own = {"head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    if "num_attention_heads" in change:
        change = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    one, other = tiny(**own), tiny(**own | change)
    other.load_state_dict(one.state_dict())
    prints = []
    for backbone in (one, other):
        torch.manual_seed(1)
        prints.append(get_peft_model(backbone, GradMemConfig(num_memory_tokens=2)).fingerprint())
    assert prints[0] != prints[1]


def test_the_fingerprint_ignores_other_config_fields():
    model = make()
    before = model.fingerprint()
    config = model.get_base_model().config
    config.pad_token_id, config.use_cache, config.name_or_path, config.attention_dropout = 7, False, "elsewhere", 0.1
    config._attn_implementation, config.max_position_embeddings, config.of_next_year = "eager", 4096, None
    with torch.no_grad():
        model.get_base_model().model.norm.weight.mul_(1)  # so that it is recomputed
    assert model.fingerprint() == before


def negate_half(tensor):
    tensor[:, 1::2].neg_()


def change_one(tensor):
    tensor[1, 1] += 1


def exchange(tensor):
    tensor.copy_(tensor.flip(0))


def double(tensor):
    tensor.mul_(2)


@pytest.mark.parametrize("change", [negate_half, change_one, exchange])
def test_every_value_of_a_weight_counts(change):
    model = make()
    before = model.fingerprint()
    with torch.no_grad():
        change(model.get_base_model().model.layers[1].mlp.up_proj.weight)
    assert model.fingerprint() != before


@pytest.mark.parametrize("change", [negate_half, exchange, double])
@pytest.mark.parametrize(
    "where", ["model.layers.1.mlp.up_proj.base_layer.weight", "memory_slots.gradmem_memory.default"]
)
def test_changes_through_parameter_data_are_noticed(where, change):
    model = make(lora_config=lora(), num_memory_tokens=8)
    state, query = model.write(tokens(1, 9)), tokens(1, 5)
    model.generate(query, memory=state, max_new_tokens=1)  # keeps keys and values of the prefix
    change(model.get_base_model().get_parameter(where).data)
    with pytest.raises(ValueError, match=f"written by model {state.fingerprint}, but this is model"):
        model.generate(query, memory=state, max_new_tokens=1)


def test_changes_through_parameter_data_invalidate_cached_prefixes():
    model = make()
    state, query = model.write(tokens(1, 9)), tokens(1, 5)
    options = {"max_new_tokens": 1, "strict": False, "output_logits": True, "return_dict_in_generate": True}
    model.generate(query, memory=state, **options)
    for parameter in model.get_base_model().model.layers.parameters():
        parameter.data.mul_(1.3)
    found = model.generate(query, memory=state, **options).logits[0]
    model.base_model.prefix_cache.clear()
    torch.testing.assert_close(found, model.generate(query, memory=state, **options).logits[0])


def other_module(layer):
    layer.up_proj = nn.Linear(32, 48, bias=False)


def other_parameter(layer):
    layer.up_proj.weight = nn.Parameter(layer.up_proj.weight + 1)


def one_more_module(layer):
    layer.up_proj.norm = nn.LayerNorm(3)  # in one that had none


def one_more_parameter(layer):
    layer.up_proj.bias = nn.Parameter(torch.zeros(48))


@pytest.mark.parametrize("change", [other_module, other_parameter, one_more_module, one_more_parameter])
def test_replaced_and_added_modules_and_parameters_are_noticed(change):
    model = make()
    before = model.fingerprint()
    assert model.fingerprint() == before
    change(model.get_base_model().model.layers[1].mlp)
    assert model.fingerprint() != before


def looks(monkeypatch):
    """Records each time a model is inspected for its fingerprint."""
    seen, get = [], FingerprintCache.get
    monkeypatch.setattr(FingerprintCache, "get", lambda *arguments: seen.append(1) or get(*arguments))
    return seen


def test_a_call_inspects_the_model_once(monkeypatch):
    model, seen = make(), looks(monkeypatch)
    state, query = model.write(tokens(1, 9)), tokens(1, 5)
    assert len(seen) == 1
    for options, expected in (({}, 1), ({"strict": False}, 1), ({"strict": False, "context_index": [0]}, 0)):
        seen.clear()
        model.generate(query, memory=state, max_new_tokens=1, **options)
        assert len(seen) == expected


def test_keys_of_several_texts_inspect_the_model_once(monkeypatch, tmp_path):
    store, pipeline = MemoryStore(tmp_path), tiny_pipeline()
    expected = [store.key(pipeline, text) for text in ("w1", "w2", "w1 w2")]
    seen = looks(monkeypatch)
    assert store.keys_of(pipeline, ["w1", "w2", "w1 w2"]) == expected
    assert len(seen) == 1
    assert store.keys_of(pipeline, []) == []


def test_the_fingerprint_depends_on_the_lora_scaling():
    model = make(lora_config=lora())
    before = model.fingerprint()
    with rescale_adapter_scale(model, 0.5):
        assert model.fingerprint() != before
    assert model.fingerprint() == before


def test_large_tensors_and_odd_dtypes_count_completely():
    """More than one block of values, a row that does not fill a block, and integers."""
    model = make()
    backbone = model.get_base_model()
    large = torch.zeros(3, 2**17 + 1)
    backbone.register_buffer("table", large)
    backbone.register_buffer("packed", torch.arange(7, dtype=torch.uint8))
    arguments = backbone, "default", model.peft_config["default"]
    seen = {fingerprint(*arguments)}
    for tensor, place in ((large, (0, 0)), (large, (2, 2**17)), (backbone.packed, (6,))):
        tensor[place] += 1
        seen.add(fingerprint(*arguments))
    assert len(seen) == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_swapping_two_values_changes_the_fingerprint_however_far_apart(dtype):
    """Half the bits of bfloat16 values are 0, and nearly all bits of round numbers."""
    model = make()
    backbone = model.get_base_model()
    torch.manual_seed(0)
    table = torch.randn(2**18).to(dtype)
    table[:4] = torch.tensor([2.0, 1.0, 0.0, 3.0])
    backbone.register_buffer("table", table)
    arguments = backbone, "default", model.peft_config["default"]
    before = fingerprint(*arguments)
    for distance in (64, 2**14, 2**15, 2**16, 2**17):
        for first in (0, 1):
            pair, values = [first, first + distance], table[[first, first + distance]]
            for other in (values[1].item(), 0.0, -2.0):
                table[pair[1]] = other
                apart = fingerprint(*arguments)
                table[pair] = table[pair].flip(0)
                if table[pair[0]] != table[pair[1]]:
                    assert fingerprint(*arguments) != apart, (distance, first, other)
                table[pair] = values
    assert fingerprint(*arguments) == before


def storage_of(parameter):
    """A reference that expires when the values that a parameter has now are freed."""
    return StorageWeakRef(parameter.untyped_storage())


@pytest.mark.parametrize("of", ["adapter", "backbone"])
def test_moved_weights_are_freed(of):
    """At once, not with the next fingerprint: a GPU may have no room for both."""
    model = make(lora_config=lora())
    before = model.fingerprint()
    old = [storage_of(parameter) for parameter in model.parameters()]
    (model if of == "adapter" else model.get_base_model()).to(torch.float64)
    assert all(storage.expired() for storage in old)
    assert model.fingerprint() == before  # the values are the same


@pytest.mark.parametrize("change", [other_module, other_parameter])
def test_replaced_modules_and_parameters_are_freed(change):
    model = make()
    model.fingerprint()
    layer = model.get_base_model().model.layers[1].mlp
    old, weight, module = (
        storage_of(layer.up_proj.weight),
        weakref.ref(layer.up_proj.weight),
        weakref.ref(layer.up_proj),
    )
    change(layer)
    gc.collect()
    assert old.expired()
    assert weight() is None
    assert (module() is None) == (change is other_module)


def test_switching_adapters_does_not_recompute_their_fingerprints(monkeypatch):
    """Only a changed weight does, also one of the adapter that is not active."""
    model, read = make(lora_config=lora()), []
    model.add_adapter("other", GradMemConfig(num_memory_tokens=3, lora_config=lora()))
    compute = fingerprint_module.fingerprint
    monkeypatch.setattr(fingerprint_module, "fingerprint", lambda *given: read.append(given[1]) or compute(*given))

    def both():
        found = []
        for name in ("default", "other"):
            model.set_adapter(name)
            found.append(model.fingerprint())
        return found

    before = both()
    assert before[0] != before[1]
    assert both() == both() == before
    assert read == ["default", "other"]
    with torch.no_grad():
        model.base_model.slots.gradmem_memory["default"].mul_(2)
    after = both()
    assert after[0] != before[0]
    assert after[1] == before[1]
    model.get_base_model().model.layers[1].mlp.up_proj.weight.data.mul_(2)
    assert not {*before, *after} & {*both()}


def test_moving_a_model_to_its_own_device_does_not_recompute_the_fingerprint(monkeypatch):
    model = make()
    before = model.fingerprint()
    monkeypatch.setattr("gradmem_adapter.utils.fingerprint.fingerprint", None)
    assert model.to("cpu").fingerprint() == before
    model.get_base_model().model.layers[1].mlp.up_proj.weight.data.mul_(2)
    with pytest.raises(TypeError):
        model.fingerprint()
