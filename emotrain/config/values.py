"""The kinds of value that a preset holds, each with its limits."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from emotrain.config.guess import nearest
from emotrain.config.names import check_run_name

Auto = Literal["auto"]
FamilyName = Literal[
    "sd15",
    "sd21",
    "sdxl",
    "anima",
    "sd3",
    "flux3",
    "flux2",
    "chroma",
    "flux",
    "zimage",
    "krea2",
    "qwen21",
    "qwen",
]
OPTIMIZERS = (
    "emosens", "emoairy", "emocats", "emonavi", "emofact", "emolynx", "emotion", "emovoid",
    "adamw", "lion", "prodigy", "schedulefree", "adafactor",
)  # fmt: skip
EMO_OPTIMIZERS = OPTIMIZERS[:8]


def _optimizer(name: str) -> str:
    if name not in OPTIMIZERS:
        found = nearest(name.rpartition(".")[2], OPTIMIZERS)
        raise ValueError("which is not an optimizer" + (f"|did you mean `{found}`?" if found else
                         f"|one of {', '.join(OPTIMIZERS)}"))  # fmt: skip
    return name


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"which is not a regular expression: {error}") from error
    if takes_forever(text):
        raise ValueError(
            "which can take forever to match|leave out repetitions inside repetitions, and all but three `.*`"
        )
    return text


_QUANTIFIER = re.compile(r"[*+]|\{\d*,\d*\}|\{\d{2,}\}")
_ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?[<!=:#P][^)(]*?[>:=!]?|.", re.DOTALL)
MOST_WIDE = 3  # repetitions of any letter: each multiplies the tries by the length of a module's name


def takes_forever(pattern: str) -> bool:
    """Whether a regular expression repeats what repeats or branches already, or has many `.*`.

    Python's matching tries all ways to split a name between them: their number has the count of repetitions as power.
    """
    wide, inner = 0, [False]
    at = 0
    while match := _ATOM.match(pattern, at):
        atom, at = match[0], match.end()
        repeats = _QUANTIFIER.match(pattern, at) is not None
        if atom.startswith("("):
            inner.append(False)
        elif atom == ")" and len(inner) > 1:
            if inner.pop() and repeats:
                return True
            inner[-1] |= repeats
        elif atom == "|":
            inner[-1] = True
        elif repeats:
            inner[-1] = True
            wide += atom == "." or atom in (r"\w", r"\W", r"\S", r"\D") or atom.startswith("[")
    return wide > MOST_WIDE


def _filled(text: str) -> str:
    if not text.strip():
        raise ValueError("which is empty")
    return text


def _shard(text: str) -> str:
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError('which is not a part such as "1/2"')
    return text


def _extension(text: str) -> str:
    if not re.fullmatch(r"\.[\w.-]+", text):
        raise ValueError('which is not an ending such as ".txt"')
    return text


# Why a value is refused is the end of a sentence; what follows a `|` is the hint.
Name = Annotated[str, AfterValidator(check_run_name)]
Shard = Annotated[str, AfterValidator(_shard)]
Extension = Annotated[str, AfterValidator(_extension)]
OptimizerName = Annotated[str, AfterValidator(_optimizer)]
Text = Annotated[str, AfterValidator(_filled)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Part = Annotated[float, Field(ge=0.0, lt=1.0)]
Pixels = Annotated[int, Field(ge=8, le=8192)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: no unknown key, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
