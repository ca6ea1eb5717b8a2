"""The Hugging Face hub: the progress of a download in bytes, and whether a failed request may succeed later."""

from typing import Any

from huggingface_hub import is_offline_mode
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]
from huggingface_hub.utils import tqdm as HubBar  # type: ignore[attr-defined]

from samq.progress import Progress

_LOST = (ConnectionError, TimeoutError, httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
_TRY_AGAIN = frozenset({408, 429})
# Of the three bars of a snapshot's download, the one of the bytes that are on disk.
_BYTES_ON_DISK = "huggingface_hub.snapshot_download"


def bytes_told_to(progress: Progress) -> type[HubBar]:
    """Return a `tqdm_class` for `huggingface_hub.snapshot_download` that draws nothing and tells `progress` of bytes.

    `progress` gets the bytes that are on disk, and the bytes of all files whose download has begun. It is called at most ten
    times a second and once at the end. It gets nothing if HF_HUB_DISABLE_PROGRESS_BARS is set.
    """

    class Bar(HubBar):
        def __init__(self, *arguments: Any, name: str | None = None, **options: Any) -> None:
            self._counts_bytes = name == _BYTES_ON_DISK
            # To tqdm a bar with `gui` is one that is drawn elsewhere.
            super().__init__(*arguments, name=name, **{**options, "disable": False, "gui": True})  # type: ignore[no-untyped-call]

        def display(self, *_: Any, **__: Any) -> None:
            if self._counts_bytes and self.total:
                progress(int(self.n), int(self.total))

    return Bar


def is_unreachable(error: BaseException) -> bool:
    """Whether the same request may succeed later: no connection, no answer in time, or a fault of the hub's own (5xx).

    False for errors that a second request does not change: a wrong name, no access, or HF_HUB_OFFLINE. The causes of an
    error count too, even where `from None` hides them: `datasets` reports a failing hub as a file that it cannot find.
    """
    if is_offline_mode():
        return False
    unseen, seen = [error], set()
    while unseen:
        cause = unseen.pop()
        if id(cause) in seen:
            continue
        seen.add(id(cause))
        status = getattr(getattr(cause, "response", None), "status_code", 0)
        if isinstance(cause, _LOST) or status >= 500 or status in _TRY_AGAIN:
            return True
        unseen += [origin for origin in (cause.__cause__, cause.__context__) if origin is not None]
    return False
