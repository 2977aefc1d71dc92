"""Threads that write, generate, stream and switch adapters, all on one model."""

from __future__ import annotations

import random
import threading
import time

import torch
from adapters import lora
from peft import get_peft_model
from tiny import tiny, tiny_text, tiny_tokenizer

from gradmem_adapter import AdapterChangedError, GradMemConfig, GradMemPipeline

ADAPTERS = ("default", "other")
TEXTS = [tiny_text(20, seed=i) for i in range(3)]
PROMPTS = ["Question : w1", "w2 w3 :", "abcdef"]


def pipeline() -> GradMemPipeline:
    """A model with two adapters, whose LoRAs act in WRITE and READ."""
    torch.manual_seed(0)
    config = {"num_memory_tokens": 3, "write_steps": 2, "write_lr": 0.5, "lora_config": lora(r=4)}
    model = get_peft_model(tiny(num_hidden_layers=4), GradMemConfig(**config))
    model.add_adapter("other", GradMemConfig(**config))
    model.eval().generation_config.eos_token_id = None
    return GradMemPipeline(model, tiny_tokenizer())


class Attack:
    """What each adapter gives by itself, and threads that compare it with results during switching."""

    def __init__(self) -> None:
        self.pipeline = pipeline()
        self.right: dict[str, tuple[list, list]] = {}
        for adapter in reversed(ADAPTERS):
            self.pipeline.model.set_adapter(adapter)
            states = [self.pipeline.write(text) for text in TEXTS]
            answers = [self.answer(prompt, state) for prompt, state in zip(PROMPTS, states, strict=True)]
            self.right[adapter] = states, answers
        self.results = {"right": 0, "refused": 0}
        self.wrong: list[str] = []
        self.dice = random.Random(0)

    def answer(self, prompt, state):
        return self.pipeline.generate(prompt, memory=state, max_new_tokens=8, do_sample=False)[0]

    def stream(self, prompt, state):
        return "".join(self.pipeline.stream(prompt, memory=state, max_new_tokens=8, do_sample=False)).strip()

    def write(self, i: int) -> None:
        state = self.pipeline.write(TEXTS[i])
        if not any(state == states[i] for states, _ in self.right.values()):
            self.wrong.append(f"a mixed state of {state.fingerprint}")

    def read(self, how, i: int) -> None:
        for adapter, (states, answers) in self.right.items():
            try:
                answer = how(PROMPTS[i], states[i])
            except ValueError as error:  # of the adapter that is not the active one
                if "was written by model" not in str(error):
                    raise
                continue
            if answer != answers[i]:
                self.wrong.append(f"{adapter} answered {answer!r} and not {answers[i]!r}")

    def switch(self, _: int) -> None:
        model = self.pipeline.model
        model.set_adapter(ADAPTERS[model.active_adapter == ADAPTERS[0]])
        time.sleep(self.dice.uniform(0, 0.3))

    def run(self, seconds: float) -> None:
        end, errors = time.monotonic() + seconds, []

        def loop(work):
            try:
                i = 0
                while time.monotonic() < end:
                    i += 1
                    try:
                        work(i % len(TEXTS))
                        self.results["right"] += work != self.switch
                    except AdapterChangedError:
                        self.results["refused"] += 1
            except BaseException as error:
                errors.append(error)

        jobs = [
            self.write,
            lambda i: self.read(self.answer, i),
            lambda i: self.read(self.stream, i),
            self.switch,
        ]
        threads = [threading.Thread(target=loop, args=(job,)) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == [], errors
        assert self.wrong == []
