"""Stage: whether torch and llama.cpp compute the same model, before anything is measured on either."""

import logging
from pathlib import Path

from samq.data.tokens import TokenBatch
from samq.evaluation.agreement import enough_tokens, measure_agreement, require_agreement, settings_for
from samq.evaluation.baseline import cut_chunks, read_tokens
from samq.evaluation.settings import BaselineRequest
from samq.files import AGREEMENT_NAME, GGUF_NAME, TOKENS_NAME
from samq.llamacpp.runtime import Model
from samq.progress import bar
from samq.store import Artifact
from samq.workspace import Workspace
from tasks.evaluate import measure_alone
from tasks.gpu import in_turn, torch_has_gpu
from tasks.model import TorchModel
from tasks.stage import stage

log = logging.getLogger("samq.agreement")


@stage(
    "agreement",
    version=3,
    run_name="compare torch and llama.cpp on {model.source.name}",
    keyed_by=("device",),
    packages=("torch", "transformers", "llama-cpp-python"),
    retries=1,
)
@in_turn(torch_has_gpu)
def agreement(at: Workspace, folder: Path, model: TorchModel, tokens: Artifact) -> None:
    """`agreement.json`; SamqError if the two compute different models, or the GGUF has other weights.

    What cannot be measured is said here, before the work.
    """
    full = model.full.file(GGUF_NAME)
    with Model(full.path, allocate=False) as opened:
        settings, bos = settings_for(opened.trained_tokens), opened.bos if opened.adds_bos else None
    ids = enough_tokens(read_tokens(tokens.path(TOKENS_NAME)), settings)
    TokenBatch.of([ids.tolist()]).save(folder / TOKENS_NAME)
    request = BaselineRequest(
        gguf=full.path, sha256=full.sha256, tokens=folder / TOKENS_NAME, output=folder, settings=settings
    )
    measure_alone(request, folder, "llama.cpp's predictions", at.timeout_s)
    torch_model, layout = model.load_with_layout(at)
    if layout.unknown:
        log.warning("%s", layout.unmeasured)
    with bar("compare torch and llama.cpp"):
        chunks = cut_chunks(ids, settings.context_tokens, bos)
        measured = measure_agreement(torch_model, model.dtype, chunks, folder, settings, full.path)
    require_agreement(measured, model.source)
    log.info("torch and llama.cpp agree within %.1g nats", measured.median_kld_nats)
    if measured.rounding_kld_nats is not None:
        log.warning("roundings alone change this model's predictions by %.1g nats", measured.rounding_kld_nats)
    measured.save(folder / AGREEMENT_NAME)
    for path in [*folder.glob("*.np[yz]"), *folder.glob("baseline.json")]:
        path.unlink()
