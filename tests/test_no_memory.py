"""Without memory, the pipeline and what is built on it answer as a backbone without an adapter."""

import threading

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import attach_align_device_hook
from adapters import lora
from langchain_gradmem import ChatGradMem
from peft import get_peft_model
from tiny import tiny, tiny_text, tiny_tokenizer, tokens

from gradmem_adapter import GradMemConfig, GradMemPipeline
from gradmem_adapter.lora import without_lora

PROMPTS = [tiny_text(6, 4), tiny_text(2, 5), tiny_text(4, 6)]
OPTIONS = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
PHASES = ["both", "write", "read"]


def make(phase="both", architecture="llama", **config):
    """A pipeline whose LoRA changes every layer, and the tokens of the untouched backbone for each prompt."""
    config = GradMemConfig(num_memory_tokens=3, write_lr=0.3, lora_config=lora(), lora_phase=phase, **config)
    return GradMemPipeline(get_peft_model(tiny(architecture), config).eval(), tiny_tokenizer())


def untouched(pipeline, prompts, architecture="llama"):
    ids, mask = pipeline.encode_prompts(prompts)
    output = tiny(architecture).generate(ids, attention_mask=mask, **OPTIONS)
    return pipeline.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_generate_and_stream_equal_the_untouched_backbone(phase, architecture):
    pipeline = make(phase, architecture)
    expected = untouched(pipeline, PROMPTS, architecture)
    assert pipeline.generate(PROMPTS, **OPTIONS) == expected
    assert pipeline.generate(PROMPTS, context_index=None, strict=True, **OPTIONS) == expected
    assert ["".join(pipeline.stream(p, **OPTIONS)) for p in PROMPTS] == [
        untouched(pipeline, [p], architecture)[0] for p in PROMPTS
    ]


def test_the_model_keeps_pefts_rule():
    """Without memory the active LoRA acts in `model.generate` and `model.forward`."""
    pipeline = make()
    ids = tokens(2, 5)
    assert not torch.equal(pipeline.model(input_ids=ids).logits, tiny()(ids).logits)
    assert not torch.equal(pipeline.model.generate(ids, **OPTIONS), tiny().generate(ids, **OPTIONS))


@pytest.mark.parametrize("phase", PHASES)
def test_a_chat_model_without_documents_equals_the_untouched_backbone(phase):
    pipeline = make(phase)
    chat = ChatGradMem(pipeline=pipeline, max_tokens=8)
    (expected,) = (text.split()[:8] for text in untouched(pipeline, [[{"role": "user", "content": "w3 w4"}]]))
    assert chat.invoke("w3 w4").text.split() == expected
    assert "".join(chunk.text for chunk in chat.stream("w3 w4")).split() == expected
    assert chat.batch(["w3 w4"])[0].text.split() == expected
    (reference,) = chat.store.write(pipeline, tiny_text(9, 1))
    assert chat.invoke("w3 w4", memory=reference).text.split() != expected


def test_context_index_needs_memory():
    with pytest.raises(ValueError, match="context_index needs a memory"):
        make().generate(PROMPTS, context_index=[0, 0, 0])


def test_other_threads_see_no_change():
    pipeline = make()
    context = tiny_text(9, 1)
    state = pipeline.write(context)
    answers = pipeline.generate(PROMPTS, memory=state, **OPTIONS)
    expected = untouched(pipeline, PROMPTS)
    wrong, errors = [], []

    def without():
        try:
            for _ in range(25):
                if pipeline.generate(PROMPTS, **OPTIONS) != expected:
                    wrong.append("without memory")
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=without)
    thread.start()
    while thread.is_alive():
        if pipeline.generate(PROMPTS, memory=state, **OPTIONS) != answers:
            wrong.append("from memory")
        if not pipeline.write(context).equal(state):
            wrong.append("WRITE")
    thread.join()
    assert not errors
    assert not wrong


def test_offloaded_backbones_run_without_the_lora():
    """Accelerate gives modules another forward, which is bound to the original module."""
    pipeline = make()
    ids, mask = pipeline.encode_prompts(PROMPTS)
    expected = tiny()(ids, attention_mask=mask).logits
    backbone = pipeline.model.get_base_model()
    attach_align_device_hook(backbone, execution_device="cpu", offload=False)
    cpu_offload(backbone.model.layers[0], execution_device="cpu")
    alone = without_lora(backbone)
    assert torch.equal(alone(ids, attention_mask=mask).logits, expected)
    assert not torch.equal(backbone(ids, attention_mask=mask).logits, expected)
    assert pipeline.generate(PROMPTS, **OPTIONS) == untouched(pipeline, PROMPTS)


def test_without_a_lora_the_model_itself_is_used():
    backbone = tiny()
    assert without_lora(backbone) is backbone
    model = get_peft_model(backbone, GradMemConfig(num_memory_tokens=3))
    assert without_lora(model.get_base_model()) is backbone


def test_a_batch_that_the_backbone_would_read_wrongly_is_refused():
    """BART and similar models count left padding as text."""
    pipeline = GradMemPipeline(
        get_peft_model(tiny("bart"), GradMemConfig(num_memory_tokens=3)).eval(), tiny_tokenizer()
    )
    with pytest.raises(NotImplementedError, match="counts padding on the left as text"):
        pipeline.generate([tiny_text(3), tiny_text(9)], max_new_tokens=2)
    assert len(pipeline.generate([tiny_text(3), tiny_text(3, 1)], max_new_tokens=2)) == 2
    chat = ChatGradMem(pipeline=pipeline, max_tokens=3)
    assert [m.content for m in chat.batch(["w1", "w2 w3"])] == [chat.invoke(text).content for text in ("w1", "w2 w3")]
