"""Which tests stay together on one of pytest-xdist's workers: those that share what takes long to make."""

from xdist.scheduler import LoadFileScheduling

END_TO_END, ARCHITECTURES = "tests/end_to_end/", "tests/architectures/"
# ggml's tables of types of 1 and 2 bits take half a minute a process
LOW_BITS = (
    "tests/samq/gguf/test_nearest.py",
    *(f"tests/samq/allocation/test_{of}.py" for of in ("types", "threshold")),
)
# The database of three nights takes 3 s
PROMOTION = "tests/samq/promotion/"
# Prefect's server takes 8 s to start
PREFECT = (
    *(
        "tests/tasks/test_stage.py",
        "tests/tasks/test_gpu.py",
        "tests/flows/test_gather.py",
        "tests/flows/test_prune.py",
    ),
    *("tests/samq/data/test_hub.py", "tests/samq/test_services.py"),
)


class BySharedFixtures(LoadFileScheduling):
    """A file's tests stay together. So do all of tests/end_to_end, which share a sweep; each architecture is by itself."""

    def _split_scope(self, nodeid: str) -> str:
        if nodeid.startswith(ARCHITECTURES):
            return nodeid
        if nodeid.startswith(LOW_BITS):
            return LOW_BITS[0]
        if nodeid.startswith(PREFECT):
            return PREFECT[0]
        if nodeid.startswith(PROMOTION):
            return PROMOTION
        return END_TO_END if nodeid.startswith(END_TO_END) else super()._split_scope(nodeid)
