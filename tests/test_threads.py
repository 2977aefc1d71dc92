"""Two threads on one model give the same as one."""

import threading
import time

import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny, tokens

from gradmem_adapter import GradMemConfig

SECONDS = 8


def test_two_threads_give_the_same_bytes_as_one_thread():
    """With a LoRA that is active in WRITE only: a phase that leaked into the other thread would show."""
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    config = GradMemConfig(num_memory_tokens=3, write_lr=0.3, write_head=True, lora_config=lora, lora_phase="write")
    model = get_peft_model(tiny(), config).eval()

    def work(job):
        state = model.write(tokens(1 + job % 3, 5 + job % 7, seed=job), steps=1 + job % 3)
        text = model.generate(tokens(len(state), 4, seed=job), memory=state, max_new_tokens=4, do_sample=False)
        return state.to_bytes() + text.numpy().tobytes()

    jobs = range(8)
    expected = [work(job) for job in jobs]
    wrong, done, errors = [], [0, 0], []
    end = time.monotonic() + SECONDS

    def loop(thread):
        try:
            while time.monotonic() < end:
                for job in jobs if thread else reversed(jobs):
                    if work(job) != expected[job]:
                        wrong.append((thread, job))
                    done[thread] += 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert not wrong
    assert min(done) >= len(jobs)
    assert torch.is_grad_enabled()
