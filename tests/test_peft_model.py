"""Type checkers know what a model with a GradMem adapter can do."""

import subprocess
import sys
from pathlib import Path

import peft
import pytest
from tiny import tiny

from gradmem_adapter import GradMemConfig, GradMemPeftModel, get_peft_model

PROGRAM = """
import torch
from transformers import PreTrainedModel
from gradmem_adapter import GradMemConfig, GradMemPipeline, get_peft_model, load_checkpoint

def program(backbone: PreTrainedModel, ids: torch.Tensor) -> None:
    made = get_peft_model(backbone, GradMemConfig())
    loaded, tokenizer = load_checkpoint("somewhere")
    for model in (made, loaded, GradMemPipeline(loaded, tokenizer).model):
        state = model.eval().write(ids, {arguments})
        model.generate(ids, memory=state)
        model.fidelity(state, ids).greedy.mean()
        model.save_pretrained("elsewhere")
"""
# Libraries whose types do not matter here would take most of a minute to read.
CONFIGURATION = """
[mypy]
ignore_missing_imports = true

[mypy-transformers.*,accelerate.*,huggingface_hub.*,numpy.*,sympy.*,torch._inductor.*,torch._dynamo.*,torch.fx.*,torch.distributed.*,torch.onnx.*,torch.export.*,torch.ao.*]
follow_imports = skip
"""


@pytest.mark.parametrize(
    ("arguments", "error"), [("steps=3", None), ("stesp=3", 'Unexpected keyword argument "stesp"')]
)
def test_mypy_finds_a_misspelt_argument(tmp_path, arguments, error, pytestconfig):
    program, configuration = tmp_path / "program.py", tmp_path / "mypy.ini"
    program.write_text(PROGRAM.format(arguments=arguments))
    configuration.write_text(CONFIGURATION)
    cache = pytestconfig.cache.mkdir("mypy")
    command = ["-m", "mypy", "--config-file", configuration, "--cache-dir", cache, program]
    root = Path(__file__).parent.parent
    result = subprocess.run([sys.executable, *map(str, command)], cwd=root, capture_output=True, text=True, check=False)
    errors = [line for line in result.stdout.splitlines() if "program.py" in line and ": error: " in line]
    if error is None:
        assert not errors
    else:
        assert len(errors) == 1
        assert error in errors[0]


def test_at_run_time_get_peft_model_is_pefts_own():
    assert get_peft_model is peft.get_peft_model
    assert isinstance(get_peft_model(tiny(), GradMemConfig()), GradMemPeftModel)
