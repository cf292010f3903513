"""What a study's folder holds: ``study.json`` and ``pictures/`` for the server, ``key.json`` for the report alone.

Nothing of the served part says which system made a picture: the key is the only place where sides have names, and
the server never opens it.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dalle_cli.errors import UserError

Side = Literal["left", "right"]
Question = Literal["realistic", "caption"]
SIDES: tuple[Side, ...] = get_args(Side)
QUESTIONS: tuple[Question, ...] = get_args(Question)
WORDING: dict[Question, str] = {
    "realistic": "Which picture is more realistic?",
    "caption": "Which picture matches the caption better?",
}
STUDY, KEY, PICTURES, VOTES = "study.json", "key.json", "pictures", "votes.sqlite"
WRONG_SHARE_PERCENT = 20
"""An annotator fails who answers more than this share of all the study's check questions wrongly."""


class _Stored(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ignored_types=(cached_property,))


class Item(_Stored):
    """One screen of the study: a caption between two pictures, named by files of ``pictures/``."""

    id: str
    caption: str
    left: str = Field(pattern=r"^[0-9a-f]{16}\.png$")
    right: str = Field(pattern=r"^[0-9a-f]{16}\.png$")
    check: Side | None = None
    """The side that an attentive annotator chooses, of attention checks only."""


class Study(_Stored):
    """The served part. Items are in the order of their ids, which says nothing."""

    format: Literal["dalle-human-study"] = "dalle-human-study"
    version: Literal[1] = 1
    annotators: int = Field(ge=1)
    """Votes wanted on each question of each pair."""
    image_size: int
    items: tuple[Item, ...]

    @cached_property
    def sha256(self) -> str:
        """Names the study in its key and its votes, so that those of another are refused."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    @cached_property
    def by_id(self) -> dict[str, Item]:
        return {item.id: item for item in self.items}

    @cached_property
    def pairs(self) -> tuple[Item, ...]:
        """The items that count, attention checks left out."""
        return tuple(item for item in self.items if item.check is None)

    @cached_property
    def checks(self) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.check is not None)

    @property
    def wrong_allowed(self) -> int:
        """Wrong answers to check questions that an annotator is forgiven."""
        return len(self.checks) * len(QUESTIONS) * WRONG_SHARE_PERCENT // 100


class KeyItem(_Stored):
    """Which caption a pair shows and whose picture is on its left."""

    caption_id: str
    left: str
    right: str


class Key(_Stored):
    """The secret part: systems by name, and the sides of each pair."""

    study: str
    systems: dict[str, str]
    """Each system's name and where its pictures came from, in the order they were given."""
    captions: str
    captions_left_out: int
    """Captions of which no system had a picture."""
    seed: int
    items: dict[str, KeyItem]


def load_study(folder: Path) -> Study:
    """The study in ``folder``. Raises UserError if there is none."""
    return _load(folder / STUDY, Study)


def load_key(folder: Path, study: Study) -> Key:
    """The key of ``study``. Raises UserError if it is missing or another study's."""
    key = _load(folder / KEY, Key)
    if key.study != study.sha256 or key.items.keys() != {item.id for item in study.pairs}:
        raise UserError(f"{folder / KEY}: is the key of another study; put back the one that was made with {STUDY}")
    return key


_Kind = TypeVar("_Kind", Study, Key)


def _load(path: Path, kind: type[_Kind]) -> _Kind:
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; name a folder that dalle human-study make wrote") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise UserError(f"{path}: is damaged ({where}: {first['msg']}); make the study anew") from None
