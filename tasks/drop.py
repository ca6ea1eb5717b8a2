"""Step: drop the files of candidates that lost."""

import logging

from samq.store import Store
from samq.sweep.selection import Finalists
from samq.sweep.sweep import Sweep
from samq.tracking.aliased import aliased_content, aliased_files, registries
from samq.workspace import Workspace
from tasks.stage import step

log = logging.getLogger("samq.drop")


@step("drop files")
def drop_files(at: Workspace, sweep: Sweep, keep: Finalists, tracking_uri: str) -> None:
    """Remove from the store the GGUFs of all candidates but those to keep, and but what MLflow's aliases point at."""
    kept, spared = sweep.finalists(keep), aliased_content(aliased_files(registries(tracking_uri)))
    dropped = [result for result in sweep.results if result.name not in kept and result.model.sha256 not in spared]
    freed = Store(at.store).forget([result.gguf for result in dropped])
    log.info(
        "dropped the files of %s: %.1f MB", ", ".join(result.name for result in dropped) or "no candidate", freed / 1e6
    )
