"""A backend of `torch.compile` that computes linear layers of the same input as one matrix product.

Queries, keys and values, and the two halves of a gated MLP, read the same hidden states. One by one their products are
narrow, and the backward pass adds their gradients up. Which layers these are is read from the traced graph, not from
their names: no module is replaced or has to remember what it computed, and whatever is called in another order or with
another input is right by construction.

The weights are concatenated in each pass, from where the model has them. No copy of them outlives the pass, so weights
changed in place need not be noticed.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import lookup_backend
from torch._subclasses import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F

WIDEST = 4096
"""Products of more columns stay apart: what concatenation costs grows with the weights, and what a joint product saves
with the tokens, of which a pass has about as many."""
ALIGNED = 64
"""Only products of multiples of so many columns are joined: parts of the result are then aligned as whole tensors are,
and narrow ones (LoRA) stay as they are."""

_UPDATES = {operator.setitem, operator.iadd, operator.isub, operator.imul, operator.itruediv}


def inductor_with_joint_products(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """The default backend, on a graph whose products are joined."""
    if join_products(module.graph):
        module.recompile()
    return lookup_backend("inductor")(module, inputs)


def join_products(graph: Graph) -> int:
    """Join products in a graph of Dynamo's; returns how many joint ones there are."""
    if any(map(_orders, graph.nodes)):
        return 0
    groups: dict[Any, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and node.target is F.linear and _is_joinable(node):
            groups[_kind(node)].append(node)
    joined = [group for group in groups.values() if len(group) > 1 and sum(map(_width, group)) <= WIDEST]
    for group in joined:
        _join(graph, group)
    return len(joined)


def _join(graph: Graph, linears: list[Node]) -> None:
    """Replace linear layers by one, computed where the first was; weights are arguments of the graph, there already."""
    x, _, bias = linears[0].args
    with graph.inserting_before(linears[0]):
        weight = graph.call_function(torch.cat, ([node.args[1] for node in linears],))
        if bias is not None:
            bias = graph.call_function(torch.cat, ([node.args[2] for node in linears],))
        product = graph.call_function(F.linear, (x, weight, bias))
        parts = graph.call_function(torch.split, (product, [_width(node) for node in linears], -1))
        for index, node in enumerate(linears):
            node.replace_all_uses_with(graph.call_function(operator.getitem, (parts, index)))
    for node in linears:
        graph.erase_node(node)


def _is_joinable(linear: Node) -> bool:
    """Plain weights and biases that are arguments of the graph; quantised ones are subclasses of tensors."""
    if linear.kwargs or len(linear.args) != 3:
        return False
    weights = [node for node in linear.args[1:] if node is not None]
    return (
        all(isinstance(node, Node) and node.op == "placeholder" for node in weights)
        and all(type(_value(node)) is FakeTensor for node in weights)
        and _width(linear) % ALIGNED == 0
    )


def _kind(linear: Node) -> Any:
    """What linear layers have in common that can be joined."""
    x, weight, bias = linear.args
    return x, _value(weight).dtype, _value(weight).device, None if bias is None else _value(bias).dtype


def _orders(node: Node) -> bool:
    """Whether it may matter what is computed before and what after a node: it changes a tensor, or the precision."""
    if node.op == "call_method":
        return node.target.endswith("_") and not node.target.endswith("__")  # type: ignore[union-attr]
    if node.op != "call_function" or node.target in _UPDATES:
        return node.op == "call_function"
    name, module = (getattr(node.target, field, "") for field in ("__name__", "__module__"))
    in_place = (name.endswith("_") and module != "_operator") or node.kwargs.get("inplace") or "out" in node.kwargs
    return bool(in_place) or "autocast" in name


def _value(node: Any) -> Tensor:
    return node.meta["example_value"]


def _width(linear: Node) -> int:
    return _value(linear.args[1]).shape[0]
