"""The notation of budgets: `1500MiB`, `4.5bpw`, `size-of:Q4_K_M`, `vram:24GiB@8192/Q8_0`."""

import math
import re
from decimal import ROUND_CEILING, Context, Decimal
from typing import Literal

from pydantic import BaseModel, ConfigDict

from samq.errors import SamqError
from samq.gguf.formats import check_mixture

_UNITS = (
    {"": 1, "B": 1}
    | {f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}
    | {f"{p}{end}": 1024**i for i, p in enumerate("KMGT", 1) for end in ("iB", "")}
)
_SIZE = r"(?P<number>\d+(?:\.\d+)?)\s*(?P<unit>[KMGT]?(?:iB|B)?)"
_FORMS = {
    "size": _SIZE,
    "bits": r"(?P<bits>\d+(?:\.\d+)?)\s*bpw",
    "mixture": r"size-of:(?P<mixture>\w+)",
    "vram": rf"vram:{_SIZE}@(?P<context>[1-9]\d{{0,8}})(?:/(?P<kv>F16|Q8_0|Q4_0))?",
}
_ROUND_UP = Context(prec=5, rounding=ROUND_CEILING)
_EXAMPLES = (
    "a size such as 1500MiB, 4.5bpw, size-of:Q4_K_M, or vram:24GiB@8192 (or @8192/Q8_0, with the KV cache's type)"
)


class WrittenBudget(BaseModel):
    """A budget as it was written. Its form determines which of the other fields are set."""

    model_config = ConfigDict(frozen=True)

    form: Literal["size", "bits", "mixture", "vram"]
    size: str = ""  # of the file, or of VRAM, as in 24GiB
    bytes: int = 0  # `size` in bytes
    bits_per_weight: Decimal = Decimal(0)
    mixture: str = ""
    context_tokens: int = 0
    kv_type: str = "F16"

    @property
    def in_words(self) -> str:
        """The budget in a sentence: `the bytes of Q4_K_M`."""
        match self.form:
            case "size":
                return self.size
            case "bits":
                return f"{self.bits_per_weight:g} bits per weight"
            case "mixture":
                return f"the bytes of {self.mixture}"
            case "vram":
                cache = "" if self.kv_type == "F16" else f" and a KV cache in {self.kv_type}"
                return f"{self.size} of VRAM at a context of {self.context_tokens} tokens{cache}"

    def of_bytes(self, size: int) -> str:
        """The smallest budget of this form (size or VRAM) and unit that allows `size` bytes, to five digits."""
        unit = self.size.lstrip("0123456789.")
        text = f"{_ROUND_UP.divide(size, _UNITS[unit]):f}{unit}" if _UNITS[unit] > 1 else f"{size}{unit}"
        if self.form == "size":
            return text
        return f"vram:{text}@{self.context_tokens}" + (f"/{self.kv_type}" if self.kv_type != "F16" else "")


def bits_budget(size: int, weights: int) -> str:
    """The smallest budget in bits per weight that allows `size` bytes for so many weights, to five digits."""
    return f"{_ROUND_UP.divide(8 * size, weights):f}bpw"


def read_budget(text: str) -> WrittenBudget:
    """Parse a budget; raises SamqError if `text` is not a budget or names an unknown mixture."""
    for form, pattern in _FORMS.items():
        if match := re.fullmatch(pattern, text):
            parts = match.groupdict()
            return WrittenBudget(
                form=form,  # type: ignore[arg-type]
                size=(parts.get("number") or "") + (parts.get("unit") or ""),
                bytes=math.floor(Decimal(parts.get("number") or 0) * _UNITS[parts.get("unit") or ""]),
                bits_per_weight=Decimal(parts.get("bits") or 0),
                mixture=check_mixture(parts["mixture"]) if parts.get("mixture") else "",
                context_tokens=int(parts.get("context") or 0),
                kv_type=parts.get("kv") or "F16",
            )
    raise SamqError(f"{text!r} is not a budget; give {_EXAMPLES}")


def read_size(text: str) -> int:
    """Bytes of a size such as 20GiB; raises SamqError if `text` is not a size."""
    if not re.fullmatch(_SIZE, text) or not (size := read_budget(text).bytes):
        raise SamqError(f"{text!r} is not a size; give a number of bytes, or one such as 20GiB or 1500MB")
    return size


def plan_name(text: str) -> str:
    """The name of a budget's plan: `samq-Q4_K_M` for size-of:Q4_K_M, `samq-4.5bpw` for 4.5bpw."""
    return "samq-" + re.sub(r"[^\w.]+", "-", text.removeprefix("size-of:"))
