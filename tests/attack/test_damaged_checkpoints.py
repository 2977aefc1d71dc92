"""Checkpoints damaged anywhere are opened as they were saved, or refused with an error that names them."""

import os
import random
import shutil
import subprocess
from contextlib import suppress

import pytest
import torch
from adapters import make
from tiny import tiny, tiny_tokenizer

from gradmem_adapter import load_checkpoint, save_checkpoint
from gradmem_adapter.checkpoint import load_weights

CONFIGS = {"lora": {"lora_config": {"r": 2, "target_modules": ["q_proj"]}}, "backbone": {"train_backbone": True}}


def flip_a_bit(file, dice, _):
    data = bytearray(file.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    file.write_bytes(data)


def change_bytes(file, dice, _):
    data = bytearray(file.read_bytes())
    for _ in range(dice.randint(1, 8)):
        data[dice.randrange(len(data))] = dice.randrange(256)
    file.write_bytes(data)


def cut(file, dice, _):
    os.truncate(file, dice.randrange(file.stat().st_size))


def insert(file, dice, _):
    data = bytearray(file.read_bytes())
    place = dice.randrange(len(data))
    data[place:place] = dice.randbytes(dice.randint(1, 9))
    file.write_bytes(data)


def delete(file, *_):
    file.unlink()


def take_another(file, dice, other):
    """The file of the same name in a checkpoint of the same shapes."""
    shutil.copy(other, file)


def pipe(file, *_):
    file.unlink()
    os.mkfifo(file)


def add(file, dice, other):
    """A file that another checkpoint might have."""
    name = dice.choice(["vocab.json", "adapter_model.bin", "special_tokens_map.json", "notes.txt"])
    (file.parent / name).write_bytes(other.read_bytes())


DAMAGES = (flip_a_bit, change_bytes, cut, insert, delete, take_another, pipe, add)


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path):
    for i, name in enumerate(("saved", "other")):
        torch.manual_seed(i)
        save_checkpoint(make(**CONFIGS[request.param]), tiny_tokenizer(), tmp_path / name)
    return tmp_path


def attack(saved, count, seed=0):
    """Damages a checkpoint `count` times; returns how often it still opened."""
    backbone = None if (saved / "saved" / "backbone").exists() else tiny()
    files = sorted(file.relative_to(saved / "saved") for file in (saved / "saved").rglob("*") if file.is_file())
    good, tokenizer = load_checkpoint(saved / "saved", backbone=backbone)
    expected = {name: tensor.clone() for name, tensor in good.state_dict().items()}
    fields, text = good.peft_config["default"].to_dict(), tokenizer.backend_tokenizer.to_str()
    dice, opened, damaged = random.Random(seed), 0, saved / "damaged"
    for i in range(count):
        shutil.copytree(saved / "saved", damaged)
        file, damage = dice.choice(files), DAMAGES[i % len(DAMAGES)]
        damage(damaged / file, dice, saved / "other" / file)
        try:
            model, tokenizer = load_checkpoint(damaged, backbone=backbone and tiny())
        except (ValueError, OSError) as error:
            message = str(error)
        else:
            message, found = f"opened {damaged}", model.state_dict()
            assert found.keys() == expected.keys(), (damage.__name__, file)
            assert all(torch.equal(found[name], expected[name]) for name in expected), (damage.__name__, file)
            assert model.peft_config["default"].to_dict() == fields, (damage.__name__, file)
            assert tokenizer.backend_tokenizer.to_str() == text, (damage.__name__, file)
            opened += 1
        assert str(damaged) in message, (damage.__name__, file)
        shutil.rmtree(damaged)
    return opened


def test_damaged_checkpoints_are_refused_or_unchanged(saved):
    assert attack(saved, 24) < 12, "most damages must matter"


@pytest.mark.slow
def test_many_damaged_checkpoints_are_refused_or_unchanged(saved):
    print(attack(saved, 300, seed=1), "of 300 were opened")


@pytest.mark.slow
def test_without_digests_damage_gives_only_our_errors(saved):
    """Checkpoints saved by PEFT have none: damage may go unnoticed, or must give one of our errors."""
    backbone = None if (saved / "saved" / "backbone").exists() else tiny()
    files = sorted(file.relative_to(saved / "saved") for file in (saved / "saved").rglob("*") if file.is_file())
    dice, damaged = random.Random(2), saved / "damaged"
    for i in range(300):
        shutil.copytree(saved / "saved", damaged)
        (damaged / "SHA256SUMS").unlink()
        file = dice.choice([file for file in files if file.name != "SHA256SUMS"])
        DAMAGES[i % len(DAMAGES)](damaged / file, dice, saved / "other" / file)
        with suppress(ValueError, TypeError, OSError, NotImplementedError):
            load_checkpoint(damaged, backbone=backbone and tiny())
        shutil.rmtree(damaged)


def test_weights_are_not_loaded_from_a_damaged_checkpoint(saved):
    model = make(**CONFIGS["backbone" if (saved / "saved" / "backbone").exists() else "lora"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flip_a_bit(saved / "saved" / "adapter_model.safetensors", random.Random(0), None)
    with pytest.raises(
        ValueError, match=r"adapter_model.safetensors has changed since it was saved.*delete SHA256SUMS"
    ):
        load_weights(model, saved / "saved")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum here")
def test_sha256sum_accepts_the_digests(saved):
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=saved / "saved", check=True)
