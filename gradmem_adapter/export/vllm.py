"""READ by vLLM, in this process or on a server."""

from __future__ import annotations

import hashlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel

from gradmem_adapter.export.engine import EnginePrompt, EngineReader, EngineSampling, lock_of
from gradmem_adapter.export.prompt_embeds import encoded
from gradmem_adapter.peft_model import GradMemPeftModel

if TYPE_CHECKING:
    from vllm import LLM

_NOT_VLLM = (http.client.HTTPException, json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError)
"""The exceptions that parsing raises if a response is cut off, or does not come from vLLM."""


class VLLMReader(EngineReader):
    """Answers from memory with vLLM, which serves a directory that `gradmem export` made.

    ```python
    llm = LLM("exported", enable_prompt_embeds=True)
    pipeline = GradMemPipeline(model, tokenizer, reader=VLLMReader(model, llm))
    ```

    Args:
        model (`PeftModel`): the model with the adapter that writes the states.
        engine (`LLM` or `str`): an `LLM` made with `enable_prompt_embeds=True`, or the address of a server started with
            `--enable-prompt-embeds`, such as `"http://localhost:8000"`. An `LLM` returns an answer as a whole, a server
            token by token.
        name (`str`, *optional*): the server's name for the model or LoRA; None: the first it lists.
        lora (`str` or `Path`, *optional*): the exported folder `lora`, for an `LLM` that serves the plain backbone.
        api_key (`str`, *optional*): the key for a server.
        timeout (`float`, *optional*, defaults to 600): the most seconds that a server may be silent.
        check_model (`bool`, *optional*, defaults to `True`): check that the engine's model is the adapter's own, before
            the first answer and after each failure of a server.
    """

    def __init__(
        self,
        model: PeftModel | GradMemPeftModel,
        engine: LLM | str,
        *,
        name: str | None = None,
        lora: str | Path | None = None,
        api_key: str | None = None,
        timeout: float = 600,
        check_model: bool = True,
    ) -> None:
        super().__init__(model, check_model=check_model)
        if isinstance(engine, str) and lora is not None:
            raise ValueError("lora needs an LLM. A server takes it with --lora-modules: pass its name there as name.")
        if isinstance(engine, str) and not engine.startswith(("http://", "https://")):
            raise ValueError(f"The address of a server must begin with http:// or https://, got {engine[:200]!r}.")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ValueError("api_key has a line end or another character that is not allowed in an HTTP header.")
        self.engine, self.name, self.lora, self.api_key, self.timeout = engine, name, lora, api_key, timeout
        self._served_name = name

    def _answers(
        self, prompts: Sequence[EnginePrompt], sampling: EngineSampling
    ) -> Generator[tuple[int, list[int], bool], None, None]:
        if isinstance(self.engine, str):
            yield from self._of_server(self.engine.rstrip("/").removesuffix("/v1"), prompts, sampling)
        else:
            yield from self._of_llm(self.engine, prompts, sampling)

    def _of_llm(
        self, llm: LLM, prompts: Sequence[EnginePrompt], sampling: EngineSampling
    ) -> Generator[tuple[int, list[int], bool], None, None]:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest

        lora = None if self.lora is None else LoRARequest(*_identity(self.lora), str(self.lora))
        parameters = SamplingParams(**_parameters(sampling), detokenize=False)
        inputs: Any = [mixed_prompt(prompt) for prompt in prompts]
        with lock_of(llm):
            outputs = llm.generate(inputs, parameters, lora_request=lora, use_tqdm=False)
        for i, output in enumerate(outputs):
            yield i, list(output.outputs[0].token_ids), True

    def _of_server(
        self, url: str, prompts: Sequence[EnginePrompt], sampling: EngineSampling
    ) -> Generator[tuple[int, list[int], bool], None, None]:
        embed = self.model.get_input_embeddings()
        ids = [torch.tensor(one.tokens, dtype=torch.long, device=embed.weight.device) for one in prompts]
        whole = [encoded(torch.cat([one.prefix, embed(row)])) for one, row in zip(prompts, ids, strict=True)]
        body = _parameters(sampling) | {"prompt_embeds": whole, "stream": True, "return_token_ids": True}
        try:
            if self._served_name is None:
                with self._request(f"{url}/v1/models") as response:
                    self._served_name = json.load(response)["data"][0]["id"]
            with self._request(f"{url}/v1/completions", body | {"model": self._served_name}) as response:
                for line in response:
                    event = line.decode().strip().removeprefix("data: ")
                    if not event or event == "[DONE]":
                        continue
                    chunk = json.loads(event)
                    if "error" in chunk:
                        raise RuntimeError(f"vLLM failed: {chunk['error']}")
                    for choice in chunk["choices"]:
                        yield _piece(choice, len(prompts))
        except (OSError, RuntimeError, *_NOT_VLLM) as error:
            self._compare_again()
            self._served_name = self.name
            if isinstance(error, _NOT_VLLM):
                raise ConnectionError(f"The server at {url} does not respond like vLLM: {error!r}.") from error
            raise

    def _request(self, url: str, body: dict[str, Any] | None = None) -> Any:
        """A response of the server, opened for reading."""
        headers = {"Content-Type": "application/json"}
        if self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        try:
            return urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=self.timeout)
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode(errors="replace")
            if '"param":"input_tokens"' in said.replace(" ", ""):
                raise ValueError(
                    "Memory and prompt are longer than vLLM's --max-model-len. Shorten the prompt, or raise the limit."
                ) from error
            raise RuntimeError(f"vLLM at {url} refused the request ({error.code}): {said}") from error
        except urllib.error.URLError as error:
            raise ConnectionError(f"There is no vLLM server at {url}: {error.reason}.") from error


def mixed_prompt(prompt: EnginePrompt) -> dict[str, Any]:
    """A prompt for `LLM.generate`: vectors for the memory, and zeros for tokens, which the engine embeds itself."""
    memory, length = prompt.prefix, len(prompt.prefix) + len(prompt.tokens)
    embeddings = memory.new_zeros(length, memory.shape[1])
    embeddings[: len(memory)] = memory
    return {
        "prompt_embeds": embeddings.cpu(),
        "prompt_token_ids": [0] * len(memory) + prompt.tokens,
        "prompt_is_token_ids": [False] * len(memory) + [True] * len(prompt.tokens),
    }


def _identity(lora: str | Path) -> tuple[str, int]:
    """A name and a number for a LoRA, derived from its path: vLLM caches LoRAs by these and ignores the path."""
    digest = hashlib.blake2b(str(Path(lora).resolve()).encode(), digest_size=4)
    return f"gradmem-{digest.hexdigest()}", 1 + int.from_bytes(digest.digest(), "big") // 2  # fits a signed int32


def _piece(choice: dict[str, Any], prompts: int) -> tuple[int, list[int], bool]:
    """The prompt's number, the new tokens and whether they are the last, from an event of a stream; `TypeError` if the
    event is not one of vLLM's."""
    index, tokens = choice["index"], choice.get("token_ids")
    if tokens is None and not choice.get("text"):
        tokens = []
    if index not in range(prompts) or type(tokens) is not list or not all(type(token) is int for token in tokens):
        raise TypeError(f"unexpected piece of an answer: {choice}")
    return index, tokens, choice.get("finish_reason") is not None


def _parameters(sampling: EngineSampling) -> dict[str, Any]:
    """Sampling options under vLLM's names. All are set, as vLLM would take others from the generation configuration."""
    own = sampling._asdict()
    fixed = {"ignore_eos": True, "min_p": 0.0, "repetition_penalty": 1.0}  # ends only by stop_token_ids
    return own | {"max_tokens": own.pop("max_new_tokens")} | fixed
