"""Read a system's pictures by caption, from a folder of files named by caption id or from lines of ``dalle sample``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dalle_cli.data.captions import normal_id
from dalle_cli.data.sample_lines import read_sample_lines
from dalle_cli.data.source import IMAGE_EXTENSIONS, split_extension
from dalle_cli.errors import UserError


@dataclass(frozen=True)
class System:
    """Pictures of a system by caption id; ``others`` counts pictures of other captions than the study's."""

    name: str
    spec: str
    pictures: Mapping[str, Path]
    others: int


def read_system(name: str, spec: str, captions: Mapping[str, str]) -> System:
    """Read the system's pictures of the study's ``captions`` (by id).

    ``spec`` is a folder of pictures named by caption ids, or a .jsonl file of ``dalle sample`` or ``dalle rerank``. Of
    several lines for one prompt, the line of rank 1 is used, or the first if none has a rank.

    Raises:
        UserError: there is no such folder or file, it has two pictures of a caption, or it has no picture of any.
    """
    path = Path(spec)
    if path.is_dir():
        found, kind = _named_files(path), "caption id"
        names = {identity: identity for identity in captions}
    elif path.suffix == ".jsonl" and path.is_file():
        found, kind = _by_prompt(path, spec), "prompt"
        names = dict(captions)
    else:
        raise UserError(
            f"system {name}: {spec} is neither a folder of pictures nor a .jsonl file of lines of dalle sample"
        )
    pictures = {identity: found[wanted] for identity, wanted in names.items() if wanted in found}
    if not found:
        raise UserError(f"system {name}: {spec} holds no picture")
    if not pictures:
        raise UserError(
            f"system {name}: none of the {len(found)} pictures of {spec} belongs to a caption of the study: its first "
            f"{kind} is {next(iter(found))!r}, the first caption is {next(iter(captions.items()))!r}"
        )
    return System(name, spec, pictures, len(found.keys() - set(names.values())))


def check_same_captions(systems: tuple[System, System], captions: Mapping[str, str]) -> list[str]:
    """Return the ids of the captions that both systems drew.

    Raises:
        UserError: a caption was drawn by only one of the systems.
    """
    for one, other in (systems, systems[::-1]):
        lacking = [identity for identity in captions if identity in one.pictures and identity not in other.pictures]
        if lacking:
            example = f"{lacking[0]} ({captions[lacking[0]]!r})"
            raise UserError(
                f"system {other.name}: {other.spec} has no picture of caption {example}, which system {one.name} has; "
                f"{len(lacking)} such captions in all; draw them, or leave them out of the captions"
            )
    return [identity for identity in captions if identity in systems[0].pictures]


def _named_files(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        stem, extension = split_extension(path.name)
        if extension not in IMAGE_EXTENSIONS or not path.is_file():
            continue
        identity = normal_id(stem)
        if identity in found:
            raise UserError(
                f"{folder}: {found[identity].name} and {path.name} both belong to caption {identity}; keep one"
            )
        found[identity] = path
    return found


def _by_prompt(path: Path, spec: str) -> dict[str, Path]:
    chosen: dict[str, tuple[bool, Path]] = {}
    with path.open(encoding="utf-8") as lines:
        for line in read_sample_lines(lines, spec):
            prompt, picture, best = line["prompt"].strip(), Path(line["png"]), line.get("rank") == 1
            if best and prompt in chosen and chosen[prompt][0] and chosen[prompt][1] != picture:
                raise UserError(f"{spec}: two pictures have rank 1 for {prompt!r}; rank them together")
            if prompt not in chosen or (best and not chosen[prompt][0]):
                chosen[prompt] = best, picture
    return {prompt: picture for prompt, (_, picture) in chosen.items()}
