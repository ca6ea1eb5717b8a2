"""What is free on this machine, and whether what a run takes fits."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from huggingface_hub import constants

from samq.errors import SamqError
from samq.requirements.memory import Taken
from samq.sensitivity.memory import compute_device, compute_devices, free_bytes


@dataclass(frozen=True)
class Machine:
    """What is free."""

    device: torch.device  # that torch computes on
    gpus: tuple[int, ...]  # bytes of each GPU that torch may use; none on a processor
    ram: int
    python: int  # bytes of RAM that Python takes with its packages, and CUDA
    disk: int  # for the store
    folder: Path  # of the store, or the nearest that exists
    cache_disk: int | None  # for the hub's files; None: they are on the same disk


@dataclass(frozen=True)
class StageNeeds:
    """What one stage takes, and how long; None if that is not estimated."""

    name: str
    what: str
    taken: Taken
    seconds: float | None


@dataclass(frozen=True)
class Resource:
    """What a run needs of one resource at its peak, and what is free of it."""

    name: str
    needed: int
    free: int
    stage: str  # at the peak
    advice: str

    @property
    def suffices(self) -> bool:
        """Whether it is enough."""
        return self.needed <= self.free


def look(device: str, store: Path) -> Machine:
    """What is free on this machine; raises SamqError for a device that torch does not have."""
    try:
        place = torch.device(compute_device(device))
        gpus = [each for each in compute_devices(device) if each.type == "cuda"]
        free = tuple(map(free_bytes, gpus or [place]))
    except (RuntimeError, AssertionError) as error:  # torch's own, also if it was built without CUDA
        reason = str(error).strip().split("\n")[0]
        raise SamqError(f"torch cannot use {device} ({reason}); set model.device to auto or cpu") from error
    python = psutil.Process().memory_info().rss
    folder, cache = (_present(path) for path in (store, Path(constants.HF_HUB_CACHE)))
    return Machine(
        device=place,
        gpus=free if gpus else (),
        ram=psutil.virtual_memory().available + python,
        python=python,
        disk=shutil.disk_usage(folder).free,
        folder=folder,
        cache_disk=None if folder.stat().st_dev == cache.stat().st_dev else shutil.disk_usage(cache).free,
    )


def _present(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def resources(
    machine: Machine,
    stages: Sequence[StageNeeds],
    download: int,
    *,
    is_whole: bool = False,
    is_spread: bool = False,
    two_blocks: int = 0,
) -> list[Resource]:
    """The peaks of all stages.

    Args:
        machine: what is free.
        stages: in the order in which they run.
        download: bytes that the hub still has to give.
        is_whole: whether all weights are in memory; else the model's blocks wait until they run.
        is_spread: whether they are on all GPUs; else the first needs the most.
        two_blocks: bytes of the largest block, twice: the next one comes while one runs.
    """
    needs = [_of_memory("RAM", stages, [machine.python + stage.taken.ram for stage in stages], machine.ram)]
    if machine.gpus:
        free = sum(machine.gpus) if is_spread else machine.gpus[0]
        gpu = _of_memory("GPU memory", stages, [stage.taken.gpu for stage in stages], free)
        if is_whole:
            limit = "set model.memory_limit to a smaller size, so that the model's blocks stay on disk until they run"
            gpu = replace(gpu, advice=limit)
        elif two_blocks > free:
            gpu = replace(gpu, advice=_TWO_BLOCKS.format(two_blocks / 2**30))
        needs.insert(0, gpu)
    kept, peaks = download if machine.cache_disk is None else 0, []
    for stage in stages:
        kept += stage.taken.kept
        peaks.append(kept + stage.taken.scratch)
    peak = max(peaks)
    advice = f"free some of {machine.folder}, set SAMQ_HOME to a folder on a larger disk, or ask for fewer candidates"
    needs.append(Resource("disk", peak, machine.disk, stages[peaks.index(peak)].name, advice))
    if download and machine.cache_disk is not None:
        advice = "free some, or set HF_HOME to a folder on a larger disk"
        needs.append(Resource("disk of the hub's cache", download, machine.cache_disk, stages[0].name, advice))
    return needs


def _of_memory(name: str, stages: Sequence[StageNeeds], needed: Sequence[int], free: int) -> Resource:
    most = max(needed)
    stage = stages[needed.index(most)].name
    advice = _ADVICE.get(stage, "use a machine with more, or end other programs")
    return Resource(name, most, free, stage, advice)


_SMALLER_BATCHES = "lower calibration.batch_size or calibration.sequence_tokens"
_LAYERS_THAT_FIT = "leave evaluation.gpu_layers out, so that llama.cpp has as much on the GPU as fits"
_TWO_BLOCKS = (
    "a block and the next one take {:.1f} GiB, so use a GPU with more memory, set model.dtype to bfloat16, "
    "or set model.device to cpu"
)
_NO_MATRICES = "set candidates.rounding to nearest, which needs no Gram matrices"
_ADVICE = {
    **dict.fromkeys(("calibrate", "check", "agreement"), _SMALLER_BATCHES),
    **dict.fromkeys(("layer inputs", "compensate"), _NO_MATRICES),
    **dict.fromkeys(("baseline", "evaluate"), _LAYERS_THAT_FIT),
}
