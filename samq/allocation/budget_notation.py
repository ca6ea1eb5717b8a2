"""How a budget is written: `1500MiB`, `4.5bpw`, `size-of:Q4_K_M`, `vram:24GiB@8192/Q8_0`; what it says, and its plan's name."""

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
    """What a budget says; its form tells which fields count."""

    model_config = ConfigDict(frozen=True)

    form: Literal["size", "bits", "mixture", "vram"]
    size: str = ""  # of the file, or of VRAM: 24GiB
    bytes: int = 0  # the same as a number
    bits_per_weight: Decimal = Decimal(0)
    mixture: str = ""
    context_tokens: int = 0
    kv_type: str = "F16"

    @property
    def in_words(self) -> str:
        """For a sentence on the plan: `the bytes of Q4_K_M`."""
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
        """The least budget of this form (size or VRAM) and unit that is no less than `size` bytes, to five digits."""
        unit = self.size.lstrip("0123456789.")
        text = f"{_ROUND_UP.divide(size, _UNITS[unit]):f}{unit}" if _UNITS[unit] > 1 else f"{size}{unit}"
        if self.form == "size":
            return text
        return f"vram:{text}@{self.context_tokens}" + (f"/{self.kv_type}" if self.kv_type != "F16" else "")


def bits_budget(size: int, weights: int) -> str:
    """The least budget in bits per weight that gives so many weights no less than `size` bytes, to five digits."""
    return f"{_ROUND_UP.divide(8 * size, weights):f}bpw"


def read_budget(text: str) -> WrittenBudget:
    """What a budget says; raises SamqError if it is none, or names an unknown mixture."""
    for form, pattern in _FORMS.items():
        if match := re.fullmatch(pattern, text):
            said = match.groupdict()
            return WrittenBudget(
                form=form,  # type: ignore[arg-type]
                size=(said.get("number") or "") + (said.get("unit") or ""),
                bytes=math.floor(Decimal(said.get("number") or 0) * _UNITS[said.get("unit") or ""]),
                bits_per_weight=Decimal(said.get("bits") or 0),
                mixture=check_mixture(said["mixture"]) if said.get("mixture") else "",
                context_tokens=int(said.get("context") or 0),
                kv_type=said.get("kv") or "F16",
            )
    raise SamqError(f"{text!r} is not a budget; give {_EXAMPLES}")


def plan_name(text: str) -> str:
    """What the plan of a budget is called: `samq-Q4_K_M` for size-of:Q4_K_M, `samq-4.5bpw`."""
    return "samq-" + re.sub(r"[^\w.]+", "-", text.removeprefix("size-of:"))
