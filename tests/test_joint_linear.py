"""Linear layers of the same input as one product: the same numbers, fewer products, and no other layer touched."""

from dataclasses import replace

import pytest
import torch
from test_fast_write import batch, compare, lora, make
from tiny import tiny
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from gradmem_adapter import joint_linear
from gradmem_adapter.fast_write import Bucket, FastPass
from gradmem_adapter.joint_linear import ALIGNED, WIDEST, join_products
from gradmem_adapter.token_losses import PLAIN
from gradmem_adapter.write import write_pass

WIDE = {  # enough for products to be joined
    "hidden_size": 128, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


@pytest.fixture
def products(monkeypatch):
    """How many products each compiled graph has; graphs are run as they are, which takes Inductor's time away."""
    found = []

    def count(graph_module, inputs):
        found.append(sum(node.target in PRODUCTS for node in graph_module.graph.nodes))
        return make_boxed_func(graph_module.forward)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(joint_linear, "lookup_backend", lambda name: aot_autograd(fw_compiler=count))
    return found


def fast_pass(model, joint=True):
    fast = FastPass(model.base_model._writer(), compiled=True, graphed=False, joint=joint)
    fast.writer = replace(fast.writer, once=PLAIN)
    return fast


def assert_plain(fast, model, memory, context):
    for gradient in (True, False):
        values = fast(Bucket.of(context, None), memory, context, gradient)
        expected = write_pass(model.base_model._writer(), memory, context, gradient)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "gemma3_text"])
def test_a_layer_has_four_products_instead_of_seven(architecture, products):
    model = make(tiny(architecture, scale=2.0, **WIDE))
    memory, context = batch(model, 5, 3, 4)  # within the tiny models' attention windows
    fast = fast_pass(model)
    assert_plain(fast, model, memory, context)
    assert products == [4, 4, 4]  # forward, backward, and forward without gradients
    assert not torch._dynamo.utils.counters["graph_break"]
    with torch.no_grad():  # nothing is kept of the weights
        for parameter in model.base_model.model.parameters():
            parameter.mul_(1.1)
    assert_plain(fast, model, memory, context)
    assert len(products) == 3


def test_inductor_gives_the_same_numbers():
    model = make(tiny(scale=2.0, **WIDE))
    compare(model, *batch(model, 5, 3, 4), compiled=True, joint=True)


def test_random_lengths_do_not_compile_anew(products):
    model, generator = make(tiny(**WIDE)), torch.Generator().manual_seed(0)
    fast = fast_pass(model)
    for _ in range(200):
        size, length = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((1, 5), (2, 90)))
        memory, context = batch(model, *[length] * size)
        fast(Bucket.of(context, None), memory, context, True)
    assert set(products) == {4}
    assert len(products) <= 4  # forward and backward, for one sample and for any other number


def test_lora_stays_apart(products):
    model = make(tiny(scale=2.0, **WIDE), lora_config=lora())
    fast = fast_pass(model)
    assert_plain(fast, model, *batch(model, 9, 5))
    assert products[0] == 4 + 7 * 2


def joined(function, *arguments):
    """How many joint products a function has; checks that it returns what it did."""
    torch._dynamo.reset()
    results = []

    def backend(graph_module, inputs):
        results.append(join_products(graph_module.graph))
        graph_module.recompile()
        return graph_module.forward

    value = torch.compile(function, backend=backend)(*(argument.clone() for argument in arguments))
    torch.testing.assert_close(value, function(*(argument.clone() for argument in arguments)))
    return sum(results)


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def layers(*widths, **kwargs):
    return [nn.Linear(8, width, **kwargs).requires_grad_(False) for width in widths]


def test_layers_of_the_same_input_in_any_order():
    a, b, c = layers(64, 128, 64)
    assert joined(lambda x: (c(x), a(x).sin() * c(x), b(x)), X) == 1
    assert joined(lambda x: (a(x), b(x + 1), a(x + 1), c(x)), X) == 1  # each x + 1 is a tensor of its own
    assert joined(lambda x, y: (a(x), b(y), c(x), a(y)), X, X + 1) == 2


def test_layers_of_other_inputs_or_kinds_stay():
    a, b = layers(64, 64)
    (unbiased,) = layers(64, bias=False)
    (double,) = layers(64, dtype=torch.float64)
    assert joined(lambda x: (a(x), b(x.sin())), X) == 0
    assert joined(lambda x: (a(x), unbiased(x)), X) == 0
    assert joined(lambda x: (a(x), double(x.double())), X) == 0
    assert joined(lambda x: (a(x), nn.functional.linear(x, b.weight * 2, b.bias)), X) == 0


def test_products_that_are_narrow_unaligned_or_very_wide_stay():
    for widths, count in (((64, 8), 0), ((ALIGNED, WIDEST - ALIGNED), 1), ((ALIGNED, WIDEST), 0)):
        a, b = layers(*widths)
        assert joined(lambda x, a=a, b=b: (a(x), b(x)), X) == count


def test_nothing_is_moved_where_order_matters():
    a, b = layers(64, 64)

    def updated(x, update):
        first = a(x)
        update(x)
        return first, b(x)

    for update in (lambda x: x.add_(1), lambda x: x.__setitem__(0, 1), lambda x: nn.functional.relu(x, inplace=True)):
        assert joined(lambda x, update=update: updated(x, update), X) == 0

    def half_precise(x):
        with torch.autocast("cpu", torch.bfloat16):
            first = a(x)
        return first, b(x)

    assert joined(half_precise, X) == 0
    assert joined(lambda x: (a(x), b(x), (x > 0) & (x < 1)), X) == 1
