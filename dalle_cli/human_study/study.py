"""A study's files: ``study.json`` and ``pictures/`` for the server, ``key.json`` for the report alone.

Only the key tells which system made a picture, and the server never opens it.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalle_cli.errors import UserError

Side = Literal["left", "right"]
Answer = Literal["left", "right", "neither"]
"""An annotator's answer: the picture on a side, or to the question about the caption that neither matches."""
Question = Literal["realistic", "caption"]
SIDES: tuple[Side, ...] = get_args(Side)
QUESTIONS: tuple[Question, ...] = get_args(Question)
WORDING: dict[Question, str] = {
    "realistic": "Which picture is more realistic?",
    "caption": "Which picture matches the caption better?",
}
STUDY, KEY, PICTURES, VOTES = "study.json", "key.json", "pictures", "votes.sqlite"
WRONG_SHARE_PERCENT = 20
"""Share of the study's check questions that an annotator may answer wrongly without being excluded."""


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(cached_property,))


class Item(_Stored):
    """A caption and the file names of two pictures in ``pictures/``."""

    id: str
    caption: str
    left: str = Field(pattern=r"^[0-9a-f]{16}\.png$")
    right: str = Field(pattern=r"^[0-9a-f]{16}\.png$")
    check: Side | None = None
    """Right answer of an attention check; None for a pair of the systems' pictures."""


class Study(_Stored):
    """The served part. Items are sorted by their ids, which are random."""

    format: Literal["dalle-human-study"] = "dalle-human-study"
    version: Literal[1, 2] = 2
    """Studies of version 1 do not take the answer "neither"."""
    annotators: int = Field(ge=1)
    """Number of votes wanted on each question of each pair."""
    image_size: int
    items: tuple[Item, ...]

    @cached_property
    def sha256(self) -> str:
        """Hash by which the key and the votes refer to this study."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @cached_property
    def by_id(self) -> dict[str, Item]:
        return {item.id: item for item in self.items}

    def answers(self, question: Question) -> tuple[Answer, ...]:
        """Return the answers to choose from (paper, figure 13)."""
        return (*SIDES, "neither") if question == "caption" and self.version > 1 else SIDES

    @cached_property
    def pairs(self) -> tuple[Item, ...]:
        """Items that are not attention checks."""
        return tuple(item for item in self.items if item.check is None)

    @cached_property
    def checks(self) -> tuple[Item, ...]:
        """Items that are attention checks."""
        return tuple(item for item in self.items if item.check is not None)

    @property
    def wrong_allowed(self) -> int:
        """Number of wrong answers to check questions that an annotator may give without being excluded."""
        return len(self.checks) * len(QUESTIONS) * WRONG_SHARE_PERCENT // 100


class KeyItem(_Stored):
    """Caption id of a pair, and the system on each side."""

    caption_id: str
    left: str
    right: str


class Key(_Stored):
    """The secret part: the systems, and the sides of each pair by item id."""

    study: str
    systems: dict[str, str]
    """Path of each system's pictures by name, in the order given."""
    captions: str
    captions_left_out: int
    """Number of captions without a picture by either system."""
    seed: int
    items: dict[str, KeyItem]


def load_study(folder: Path) -> Study:
    """Read the study in ``folder``.

    Raises:
        UserError: it is missing or damaged.
    """
    return _load(folder / STUDY, Study)


def load_key(folder: Path, study: Study) -> Key:
    """Read the key of ``study`` from its folder.

    Raises:
        UserError: the key is missing, or belongs to another study.
    """
    key = _load(folder / KEY, Key)
    if key.study != study.sha256 or key.items.keys() != {item.id for item in study.pairs}:
        raise UserError(f"{folder / KEY}: is the key of another study; put back the one made together with {STUDY}")
    return key


_Kind = TypeVar("_Kind", Study, Key)


def _load(path: Path, kind: type[_Kind]) -> _Kind:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a folder that dalle human-study make wrote") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise UserError(f"{path}: is damaged ({where}: {first['msg']}); make the study anew") from None
