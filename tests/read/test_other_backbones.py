"""READ on backbones that count positions and losses in their own ways."""

import pytest
import torch
from reading import ROWS, greedy_without_cache, make, pad_left
from tiny import tiny, tokens
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from gradmem_adapter import GradMemConfig, get_peft_model


@pytest.mark.parametrize("architecture", ["roberta", "llama"])
def test_a_mask_of_ones_changes_nothing(architecture):
    """RoBERTa's positions start after its padding index."""
    model = make(architecture)
    state, query = model.write(tokens(2, 9)), tokens(2, 5, seed=1)
    plain = model(input_ids=query, memory=state).logits
    torch.testing.assert_close(
        model(input_ids=query, memory=state, attention_mask=torch.ones_like(query)).logits, plain
    )
    left = model(input_ids=F.pad(query, (2, 0)), memory=state, attention_mask=F.pad(torch.ones_like(query), (2, 0)))
    torch.testing.assert_close(left.logits[:, 2:], plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ["roberta"])
def test_generation_equals_argmax_without_a_cache(architecture):
    model = make(architecture)
    states = model.write(tokens(3, 9))
    ids, mask = pad_left(ROWS, 7)
    output = model.generate(
        ids, attention_mask=mask, memory=states, max_new_tokens=5, do_sample=False, eos_token_id=None
    )
    for i, row in enumerate(ROWS):
        assert torch.equal(output[i, 7 - len(row) :], greedy_without_cache(model, states[i], row, 5))


def test_left_padding_that_would_shift_positions_is_refused():
    """BART has absolute positions and takes no `position_ids`."""
    model = make("bart")
    state, query = model.write(tokens(2, 9)), tokens(2, 5, seed=1)
    plain, ones = model(input_ids=query, memory=state).logits, torch.ones_like(query)
    right = model(input_ids=F.pad(query, (0, 2)), memory=state, attention_mask=F.pad(ones, (0, 2)))
    torch.testing.assert_close(right.logits[:, :-2], plain, rtol=1e-4, atol=1e-5)
    for side in ((2, 0), (0, 2)):  # generation moves padding to the left
        with pytest.raises(NotImplementedError, match=r"BartForCausalLM counts padding.*prompts of the same length"):
            model.generate(F.pad(query, side), memory=state, attention_mask=F.pad(ones, side), max_new_tokens=2)
    with pytest.raises(NotImplementedError, match="BartForCausalLM counts padding"):
        model(input_ids=F.pad(query, (2, 0)), memory=state, attention_mask=F.pad(ones, (2, 0)))
    output = model.generate(query, memory=state, attention_mask=ones, max_new_tokens=4, eos_token_id=None)
    for i in range(2):  # BART ends with eos
        assert torch.equal(output[i, :-1], greedy_without_cache(model, state[i], query[i], 3))


@pytest.mark.parametrize("architecture", ["bart", "llama"])
def test_the_loss_is_the_shifted_cross_entropy(architecture):
    """BART's own loss compares each position with its own token."""
    model = make(architecture)
    query = tokens(2, 5, seed=1)
    state = model.write(tokens(2, 9))
    output = model(input_ids=query, labels=query, memory=state)
    prefix = model.prefix_embeddings(state)
    embeddings = torch.cat([prefix, model.get_input_embeddings()(query)], dim=1)
    logits = model.get_base_model()(inputs_embeds=embeddings).logits[:, prefix.shape[1] - 1 : -1]
    torch.testing.assert_close(output.loss, F.cross_entropy(logits.flatten(0, 1), query.flatten()))
    torch.testing.assert_close(output.target_nll.sum(), 10 * output.loss)
    few = model(input_ids=query, labels=query, memory=state, max_targets=5)
    torch.testing.assert_close((few.loss, few.target_nll), (output.loss, output.target_nll))
    halved = model(input_ids=query, labels=query, memory=state, num_items_in_batch=20)
    torch.testing.assert_close(halved.loss, output.loss / 2)


@pytest.mark.parametrize("architecture", ["gpt2", "roberta", "llama"])
def test_a_query_beyond_the_last_position_is_refused(architecture):
    model = make(architecture, num_control_tokens=0)
    state, positions = model.write(tokens(1, 9)), model.positions
    assert positions == (94 if architecture == "roberta" else 96)
    longest = tokens(1, positions - 3)
    assert model(input_ids=longest, memory=state).logits.isfinite().all()
    padded, mask = pad_left([longest[0]], positions + 2)
    assert model(input_ids=padded, attention_mask=mask, memory=state).logits.isfinite().all()
    for read in (model, model.generate):
        with pytest.raises(ValueError, match=f"{positions - 2} tokens, but at most {positions - 3} are allowed"):
            read(input_ids=tokens(1, positions - 2), memory=state)


def test_position_limits_with_other_config_names():
    """They limit a table of biases in MPT, and one of embeddings in Whisper's decoder."""
    names = {"mpt": "max_seq_len", "whisper": "max_target_positions"}
    sizes = {"vocab_size": 61, "d_model": 32, "n_heads": 4, "n_layers": 1, "decoder_layers": 1, "pad_token_id": 0}
    for kind, name in names.items():
        config = AutoConfig.for_model(kind, **sizes, bos_token_id=1, eos_token_id=2, **{name: 20})
        config.decoder_attention_heads = config.encoder_attention_heads = 4
        model = get_peft_model(AutoModelForCausalLM.from_config(config), GradMemConfig(num_memory_tokens=3)).eval()
        state = model.write(tokens(1, 17))
        with pytest.raises(ValueError, match="18 tokens, but at most 17 are allowed"):
            model.write(tokens(1, 18))
        with pytest.raises(ValueError, match="18 tokens, but at most 17 are allowed"):
            model.generate(tokens(1, 18), memory=state)


def test_the_router_loss_is_added():
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, router_aux_loss_coef=0.5,
    )  # fmt: skip
    model = get_peft_model(MixtralForCausalLM(config), GradMemConfig(num_memory_tokens=3)).eval()
    query, state = tokens(2, 5), model.write(tokens(2, 9))
    plain = model(input_ids=query, labels=query, memory=state)
    routed = model(input_ids=query, labels=query, memory=state, output_router_logits=True)
    assert routed.loss > plain.loss + 0.1
    with pytest.raises(ValueError, match="cannot be combined with output_router_logits"):
        model(input_ids=query, labels=query, memory=state, output_router_logits=True, max_targets=5)


def bamba():
    """Its `prepare_inputs_for_generation` passes on `inputs_embeds` without naming them."""
    return AutoConfig.for_model(
        "bamba", vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=4,
        mamba_n_groups=1, mamba_chunk_size=8, pad_token_id=0,
    )  # fmt: skip


def mamba():
    """Has no keys and values."""
    return AutoConfig.for_model("mamba", vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4)


def first_gpt():
    """Has no cache at all."""
    return AutoConfig.for_model("openai-gpt", vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=96)


@pytest.mark.parametrize("config", [bamba, mamba, first_gpt])
def test_backbones_whose_cache_is_not_keys_and_values(config):
    torch.manual_seed(0)
    backbone = AutoModelForCausalLM.from_config(config())
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    backbone.generation_config.pad_token_id = 0
    model = get_peft_model(backbone, GradMemConfig(num_memory_tokens=3, memory_init_std=1.0)).eval()
    context, prompt = tokens(1, 9), tokens(1, 5, seed=1)
    state = model.write(context)
    output = model.generate(prompt, memory=state, max_new_tokens=6, eos_token_id=None, do_sample=False)
    assert torch.equal(output[0], greedy_without_cache(model, state, prompt[0], 6))
    assert "prepare_inputs_for_generation" not in backbone.__dict__
    first = model.prefix_embeddings(state)
    with torch.no_grad():
        expected = []
        for _ in range(4):
            expected.append(backbone(inputs_embeds=first).logits[:, -1].argmax(-1))
            first = torch.cat([first, backbone.get_input_embeddings()(expected[-1][:, None])], dim=1)
    assert torch.equal(model.reconstruct(state, 4), torch.stack(expected, dim=1))
    assert model.fidelity(state, context).greedy.shape == (1,)


def test_a_backbone_whose_generation_drops_memory_is_refused():
    class Dropping(LlamaForCausalLM):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            return {"input_ids": input_ids}

    config = GradMemConfig(num_memory_tokens=3, probe_backbone=False)
    model = get_peft_model(Dropping(tiny().config), config).eval()
    state = model.write(tokens(1, 9))
    with pytest.raises(NotImplementedError, match="Dropping"):
        model.generate(tokens(1, 4), memory=state, max_new_tokens=2)
