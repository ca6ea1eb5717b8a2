"""The Hugging Face hub: whether it was the network that kept a model or a data set from us."""

from huggingface_hub import is_offline_mode
from huggingface_hub.utils import httpx

_LOST = (ConnectionError, TimeoutError, httpx.TimeoutException, httpx.NetworkError, httpx.RemoteProtocolError)
_TRY_AGAIN = frozenset({408, 429})


def is_unreachable(error: BaseException) -> bool:
    """Whether the hub may answer when asked again: no connection, none in time, or a fault of its own (5xx).

    False for what asking again does not change: a wrong name, no access, or HF_HUB_OFFLINE. Looks at what the error came
    from, too, even where `from None` hides it: `datasets` says of a hub that fails that it could not find a file.
    """
    if is_offline_mode():
        return False
    open_, seen = [error], set()
    while open_:
        found = open_.pop()
        if id(found) in seen:
            continue
        seen.add(id(found))
        status = getattr(getattr(found, "response", None), "status_code", 0)
        if isinstance(found, _LOST) or status >= 500 or status in _TRY_AGAIN:
            return True
        open_ += [origin for origin in (found.__cause__, found.__context__) if origin is not None]
    return False
