"""What a parameter file's run takes of this machine, stage by stage, before anything of it starts."""

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from flows.parameters import RequantizeParameters
from samq.allocation.price_rows import priced_weights
from samq.allocation.target import OpenTarget, stock_plan
from samq.allocation.types import legal_types, threshold_types, types_to_price
from samq.data.datasets import is_on_hub, load_texts
from samq.gguf.file import HashedFile
from samq.home import store_folder
from samq.llamacpp.toolchain import find_toolchain
from samq.progress import Progress, silent
from samq.requirements import memory
from samq.requirements.candidates import CandidateSize, of_budget, of_mixture, of_threshold, thresholds_kept
from samq.requirements.machine import Machine, Resource, StageNeeds, look, resources
from samq.requirements.memory import Taken, TorchRun
from samq.requirements.outline import Outline, read_outline, write_even_importance
from samq.requirements.rates import measure_rates
from samq.requirements.seconds import Clock
from samq.sensitivity.hf_model import DTYPES

BYTES_A_TOKEN = 3  # of text, at least
UNKNOWN_CHUNKS = 16  # of held-out text, if all are wanted


@dataclass(frozen=True)
class Requirements:
    """What a run takes."""

    stages: list[StageNeeds]
    resources: list[Resource]

    @property
    def seconds(self) -> float:
        """Of the stages whose time is estimated."""
        return sum(stage.seconds or 0.0 for stage in self.stages)


@dataclass(frozen=True)
class _Plans:
    """The candidates of a run, as far as they are known before it."""

    nearest: list[CandidateSize]  # mixtures and thresholds, by llama-quantize
    budgets: list[CandidateSize]
    are_compensated: bool  # the budgets' plans; else llama-quantize writes them as well
    priced: dict[str, int]  # type -> weights that are rounded to it

    @property
    def quantized(self) -> list[CandidateSize]:
        """What llama-quantize writes."""
        return self.nearest + ([] if self.are_compensated else self.budgets)

    @property
    def compensated(self) -> list[CandidateSize]:
        """What is compensated together."""
        return self.budgets if self.are_compensated else []

    @property
    def all(self) -> list[CandidateSize]:
        """Every candidate but full precision."""
        return self.nearest + self.budgets


def estimate(parameters: RequantizeParameters, progress: Progress = silent) -> Requirements:
    """Estimate GPU memory, RAM, disk and time of a run from its start; nothing is downloaded, and no weights are read.

    `progress` is told of the measurements of this machine. Raises SamqError if the model is not on this machine.
    """
    model, calibration = parameters.model, parameters.calibration
    machine = look(model.device, store_folder())
    with TemporaryDirectory(prefix="samq-outline-") as work:
        outline = read_outline(model.source, model.revision, model.precision, Path(work))
        plans = _plans(parameters, outline, Path(work))
        run = TorchRun(
            outline,
            DTYPES[model.dtype].itemsize,
            on_gpu=machine.device.type == "cuda",
            rooms=tuple(model.memory_limit_bytes or free for free in machine.gpus or (machine.ram,)),
            batch_size=calibration.batch_size,
            sequence_tokens=calibration.sequence_tokens,
        )
        types = {*plans.priced, *(kind for plan in plans.all for kind in plan.weights)}
        rates = measure_rates(machine.folder, machine.device, model.dtype, types, progress)
        gpu = 0 if parameters.evaluation.gpu_layers == 0 else sum(machine.gpus)
        clock = Clock(run, model.dtype, rates, machine.ram, gpu)
        stages = _stages(parameters, plans, clock, machine)
        needed = resources(
            machine,
            stages,
            outline.download_bytes,
            is_whole=run.is_whole,
            is_spread=run.is_spread,
            two_blocks=run.two_blocks,
        )
        return Requirements(stages, needed)


def _plans(parameters: RequantizeParameters, outline: Outline, work: Path) -> _Plans:
    """Ask llama-quantize about the outline, as the run will about the model."""
    wanted, toolchain = parameters.candidates, find_toolchain()
    imatrix = HashedFile(write_even_importance(outline, work), "") if parameters.calibration.imatrix else None
    target = OpenTarget.open(HashedFile(outline.gguf, ""), toolchain, imatrix)
    stock = [stock_plan(target, mixture) for mixture in wanted.mixtures]
    policy = wanted.threshold_policy
    types = types_to_price(target, {*wanted.ladder_types, *(threshold_types(target, policy) if policy else ())}, stock)
    priced: dict[str, int] = {}
    for name, kinds in legal_types(target, types).items():
        for kind in kinds:
            priced[kind] = priced.get(kind, 0) + priced_weights(target.tensors[name])
    budgets = [of_budget(target, budget, wanted.ladder) for budget in wanted.budgets]
    nearest = [of_mixture(target, mixture) for mixture in wanted.mixtures]
    if policy:
        kept = thresholds_kept(wanted.thresholds, wanted.proposed_thresholds)
        nearest += [of_threshold(target, policy, share) for share in kept]
    return _Plans(nearest, budgets, wanted.compensated, priced)


def _stages(parameters: RequantizeParameters, plans: _Plans, clock: Clock, machine: Machine) -> list[StageNeeds]:
    run, calibration = clock.run, parameters.calibration
    available = max(_sequences(parameters) - calibration.check_sequences, 1)
    tokens = min(calibration.gram_tokens + run.sequence_tokens, available * run.sequence_tokens)
    matrices = parameters.candidates.compensated
    stages = _model_stages(parameters, clock, machine)
    if calibration.imatrix or matrices:
        taken = memory.layer_inputs(run, tokens, matrices=matrices)
        what = f"on {tokens:,} tokens at most"
        stages.append(StageNeeds("layer inputs", what, taken, clock.inputs(tokens, matrices=matrices)))
    baseline, *evaluated = _measuring_stages(parameters, plans, clock)
    stages += [baseline, *_cost_stages(parameters, plans, clock, available)]
    stages += [*_candidate_stages(plans, clock, tokens), *evaluated]
    if calibration.check_sequences and plans.budgets:
        taken = memory.check(run, calibration.check_sequences)
        each = (clock.check(plan.bytes, calibration.check_sequences, taken.scratch) for plan in plans.budgets)
        stages.append(StageNeeds("check", f"predictions of {len(plans.budgets)} plans", taken, sum(each)))
    return stages


def _cost_stages(
    parameters: RequantizeParameters, plans: _Plans, clock: Clock, available: int
) -> tuple[StageNeeds, StageNeeds]:
    """Gradients and prices: of the first sequences, and perhaps of all others."""
    first = min(parameters.calibration.first_sequences, available) if parameters.candidates.budgets else available
    counts = [first] if first == available else [first, available - first]
    passes = [memory.gradients(clock.run, count) for count in counts]
    most = Taken(*(max(getattr(taken, part) for taken in passes) for part in ("gpu", "ram", "scratch")))
    again = "" if first == available else f", {first} at first"
    seconds = sum(clock.gradients(count, taken.scratch) for count, taken in zip(counts, passes, strict=True))
    twice = "" if first == available else ", twice if the first sequences are too few"
    return (
        StageNeeds("calibrate", f"gradients of {available} sequences at most{again}", most, seconds),
        StageNeeds(
            "price",
            f"rounding to {len(plans.priced)} types{twice}",
            memory.pricing(),
            len(counts) * clock.rounding([plans.priced]),
        ),
    )


def _measuring_stages(parameters: RequantizeParameters, plans: _Plans, clock: Clock) -> list[StageNeeds]:
    """What llama.cpp measures: the baseline, all candidates, and benchmarks, whose items are not known here."""
    settings, outline = parameters.evaluation, clock.run.outline
    chunks = settings.chunks or UNKNOWN_CHUNKS
    of_chunk = 4 * settings.scored_per_chunk * outline.vocabulary
    sizes = [outline.bytes, *(plan.bytes for plan in plans.all)]
    gpu = outline.bytes if settings.gpu_layers == -1 and clock.rates.gpu_bytes else 0
    seconds = sum(clock.evaluation(size, settings, chunks) for size in sizes)
    stages = [
        StageNeeds(
            "baseline",
            "logits in full precision",
            Taken(gpu, ram=of_chunk, kept=chunks * of_chunk),
            clock.baseline(settings, chunks),
        ),
        StageNeeds("evaluate", f"{len(sizes)} GGUFs, one in full precision", Taken(gpu, ram=2 * of_chunk), seconds),
    ]
    if parameters.benchmarks.tasks:
        stages.append(StageNeeds("benchmark", ", ".join(parameters.benchmarks.tasks), Taken(), None))
    return stages


def _model_stages(parameters: RequantizeParameters, clock: Clock, machine: Machine) -> list[StageNeeds]:
    outline, run = clock.run.outline, clock.run
    is_linked = outline.is_full_gguf and outline.gguf.stat().st_dev == machine.folder.stat().st_dev
    written = 0 if is_linked else outline.bytes
    source = StageNeeds("find model", "hash its files", Taken(), clock.files(read=outline.source_bytes))
    if outline.download_bytes:
        source = StageNeeds("find model", f"{outline.download_bytes / 1e9:,.1f} GB to come from the hub", Taken(), None)
    kept = f"full precision, {parameters.model.precision}" if written else "in full precision already"
    finite = outline.bytes / clock.rates.hash_bytes  # all values are looked at
    running = run.on_device(run.forward)
    return [
        source,
        StageNeeds("convert", kept, Taken(kept=written), finite + clock.files(read=outline.bytes, written=written)),
        StageNeeds("agreement", "torch and llama.cpp on the same tokens", running, clock.agreement()),
    ]


def _candidate_stages(plans: _Plans, clock: Clock, tokens: int) -> list[StageNeeds]:
    stages = []
    if plans.quantized:
        size = sum(plan.bytes for plan in plans.quantized)
        taken = memory.llama_quantize(clock.run.outline).beside(Taken(kept=size))
        seconds = clock.rounding(plan.weights for plan in plans.quantized) + clock.files(written=size)
        stages.append(StageNeeds("quantize", f"{len(plans.quantized)} GGUFs by llama-quantize", taken, seconds))
    if plans.compensated:
        size = sum(plan.bytes for plan in plans.compensated)
        taken = memory.compensation(clock.run, tokens).beside(Taken(kept=size))
        seconds = clock.compensation((plan.weights for plan in plans.compensated), tokens) + clock.files(written=size)
        stages.append(StageNeeds("compensate", f"{len(plans.compensated)} GGUFs together", taken, seconds))
    return stages


def _sequences(parameters: RequantizeParameters) -> int:
    """The calibration's sequences: known without the text if each sample is one, and never read from the hub."""
    calibration, spec = parameters.calibration, parameters.calibration.dataset
    if spec.samples is not None and not calibration.packing:
        return spec.samples
    if is_on_hub(spec.name):
        return calibration.first_sequences + calibration.check_sequences
    texts = load_texts(spec)
    if not calibration.packing:
        return len(texts)
    tokens = sum(len(text.encode()) for text in texts) / BYTES_A_TOKEN
    return math.ceil(tokens / calibration.sequence_tokens)
