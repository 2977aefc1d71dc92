"""Token ids, labels and indices of any width give the same as those of 64 bits, everywhere."""

import pytest
import torch
from adapters import make
from tiny import rows, tiny_tokenizer, tokens

from gradmem_adapter.training import GradMemCollator, GradMemTrainer, GradMemTrainingArguments

IDS, MASK = tokens(2, 7), torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
ORDER = torch.tensor([1, 0])
USES = {
    "write": lambda model, state, ids, mask, order: model.write(ids, mask).vectors,
    "write many": lambda model, state, ids, mask, order: model.write_many(list(ids), progress=False).vectors,
    "fidelity": lambda model, state, ids, mask, order: model.fidelity(state, ids, mask).greedy,
    "read": lambda model, state, ids, mask, order: model(ids, mask, labels=ids, memory=state).loss,
    "read at targets": lambda model, state, ids, mask, order: (
        model(ids, mask, labels=ids, memory=state, max_targets=7).loss
    ),
    "train": lambda model, state, ids, mask, order: (
        model(ids, mask, labels=ids, context_input_ids=ids, context_attention_mask=mask, context_index=order).loss
    ),
    "without memory": lambda model, state, ids, mask, order: model(ids, mask, labels=ids).loss,
    "generate": lambda model, state, ids, mask, order: model.generate(
        ids, attention_mask=mask, memory=state, context_index=order, max_new_tokens=3, do_sample=False
    ),
    "generate without memory": lambda model, state, ids, mask, order: model.generate(
        ids, attention_mask=torch.ones_like(mask), max_new_tokens=3, do_sample=False
    ),
}


@pytest.fixture(scope="module")
def model():
    return make(write_head=True, lora_config={"r": 2, "target_modules": "all-linear", "init_lora_weights": False})


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("use", USES)
def test_narrow_ids_give_the_same_in_the_model(model, use, dtype):
    state = model.write(IDS, MASK)
    expected = USES[use](model, state, IDS, MASK, ORDER)
    assert torch.equal(USES[use](model, state, IDS.to(dtype), MASK.to(dtype), ORDER.to(dtype)), expected)


class Narrow(GradMemCollator):
    """A collator whose batches have 32-bit ids."""

    def __call__(self, rows, first=0):
        batch = super().__call__(rows, first)
        return {k: v.int() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def test_narrow_ids_give_the_same_in_training_and_evaluation(tmp_path):
    found = []
    for collator in (GradMemCollator, Narrow):
        torch.manual_seed(0)
        arguments = GradMemTrainingArguments(
            str(tmp_path), max_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True
        )
        trainer = GradMemTrainer(
            make(), arguments, collator(tiny_tokenizer()), rows(2, 6), rows(2, 6), tiny_tokenizer()
        )
        loss = trainer.train().training_loss
        metrics = trainer.evaluate()
        found.append([loss, metrics["eval_loss"], metrics["eval_f1"]])
    assert found[0] == found[1]
