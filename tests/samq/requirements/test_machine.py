import os
import shutil

import pytest
import torch
from huggingface_hub import constants

from samq.errors import SamqError
from samq.requirements.machine import Machine, Resource, StageNeeds, look, resources
from samq.requirements.memory import Taken

STAGES = [
    StageNeeds("find model", "", Taken(), None),
    StageNeeds("convert", "", Taken(ram=1, kept=100), 1.0),
    StageNeeds("calibrate", "", Taken(gpu=8, ram=9, scratch=70), 1.0),
    StageNeeds("quantize", "", Taken(ram=5, kept=50), 1.0),
    StageNeeds("compensate", "", Taken(gpu=20, ram=2, kept=10, scratch=3), 1.0),
]


def machine(tmp_path, **free):
    settings = dict(gpus=(24, 10), ram=64, python=4, disk=200, cache_disk=None)
    return Machine(device=torch.device("cpu"), folder=tmp_path, **settings | free)


def by_name(needs):
    return {resource.name: resource for resource in needs}


def test_the_peaks_are_of_memory_the_largest_stage_and_of_the_disk_what_is_there_at_once(tmp_path):
    needs = by_name(resources(machine(tmp_path), STAGES, download=0))
    assert list(needs) == ["GPU memory", "RAM", "disk"]
    assert (needs["GPU memory"].needed, needs["GPU memory"].stage) == (20, "compensate")
    assert (needs["RAM"].needed, needs["RAM"].stage) == (4 + 9, "calibrate")
    assert (needs["disk"].needed, needs["disk"].stage) == (100 + 70, "calibrate")
    assert all(resource.suffices for resource in needs.values())
    later = [*STAGES, StageNeeds("evaluate", "", Taken(kept=20), 1.0)]
    assert by_name(resources(machine(tmp_path), later, download=0))["disk"].needed == 180


def test_the_first_gpu_counts_unless_the_weights_are_on_all(tmp_path):
    for is_spread, free in ((False, 24), (True, 34)):
        needs = resources(machine(tmp_path), STAGES, download=0, is_whole=True, is_spread=is_spread)
        assert by_name(needs)["GPU memory"].free == free


def test_what_the_hub_still_has_to_give_needs_room_on_its_disk(tmp_path):
    here = by_name(resources(machine(tmp_path), STAGES, download=40))
    assert here["disk"].needed == 40 + 170
    assert not here["disk"].suffices
    elsewhere = by_name(resources(machine(tmp_path, cache_disk=30), STAGES, download=40))
    assert elsewhere["disk"].needed == 170
    assert elsewhere["disk of the hub's cache"] == Resource(
        "disk of the hub's cache", 40, 30, "find model", "free some, or set HF_HOME to a folder on a larger disk"
    )


def test_what_does_not_suffice_says_what_to_do(tmp_path):
    needs = by_name(resources(machine(tmp_path, gpus=(7, 99), ram=12, disk=169), STAGES, download=0))
    assert not any(resource.suffices for resource in needs.values())
    assert "candidates.rounding to nearest" in needs["GPU memory"].advice
    assert "calibration.batch_size" in needs["RAM"].advice
    assert "SAMQ_HOME" in needs["disk"].advice
    whole = by_name(resources(machine(tmp_path, gpus=(7,)), STAGES, download=0, is_whole=True))
    assert "model.memory_limit" in whole["GPU memory"].advice
    for two_blocks, advice in ((7, "candidates.rounding"), (8, "a block and the next one take")):
        needs = by_name(resources(machine(tmp_path, gpus=(7,)), STAGES, download=0, two_blocks=two_blocks))
        assert advice in needs["GPU memory"].advice


def test_this_machine_without_a_gpu_has_ram_and_the_stores_disk(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    seen = look("auto", tmp_path / "home" / "store")
    assert (seen.device, seen.gpus, seen.folder, seen.cache_disk) == (torch.device("cpu"), (), tmp_path, None)
    assert seen.disk == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    assert 0 < seen.python < seen.ram <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + seen.python
    with pytest.raises(SamqError, match=r"torch cannot use cuda:0 .*set model.device to auto or cpu"):
        look("cuda:0", tmp_path)
    with pytest.raises(SamqError, match="torch cannot use nonsense"):
        look("nonsense", tmp_path)


def test_the_hubs_cache_may_be_on_a_disk_of_its_own(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(disk.folder / "hub"))
    assert look("cpu", tmp_path).cache_disk == shutil.disk_usage(disk.folder).free <= 2**20
