"""GRADMEM as a PEFT method."""

import importlib
import json
import pickle

from peft import PeftType

import gradmem_adapter
from gradmem_adapter import registration


def test_registration_can_be_repeated():
    members = list(PeftType)
    gradmem_adapter.register()
    importlib.reload(registration).register()
    assert list(PeftType) == members
    assert members.count("GRADMEM") == 1


def test_the_member_behaves_like_pefts_own():
    member = PeftType.GRADMEM
    assert member == "GRADMEM" == PeftType("GRADMEM") == PeftType["GRADMEM"]
    assert pickle.loads(pickle.dumps(member)) is member
    assert json.loads(json.dumps(member)) == "GRADMEM"
    assert isinstance(member, PeftType)
