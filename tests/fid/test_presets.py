from __future__ import annotations

from pathlib import Path

import pytest
from helpers.generated_pictures import noise, write_coco

from dalle_cli.errors import UserError
from dalle_cli.fid.presets import open_preset


def test_coco_draws_captions_by_the_seed_against_the_whole_set(tmp_path: Path) -> None:
    write_coco(tmp_path / "coco")
    preset = open_preset("coco", str(tmp_path / "coco"), 3, seed=1)
    assert len(preset.captions) == 3
    assert preset.warnings == []
    for identity, caption in preset.captions.items():
        i, j = divmod(int(identity) - 100, 2)
        assert caption == f"caption {i} {j}"
        assert preset.pictures[identity].name == f"{i:03d}.png"
    assert [path.name for path in preset.reference] == [f"{i:03d}.png" for i in range(4)]
    assert open_preset("coco", str(tmp_path / "coco"), 3, seed=1) == preset
    assert open_preset("coco", str(tmp_path / "coco"), 3, seed=2).captions != preset.captions
    file = tmp_path / "coco" / "annotations" / "captions_val2014.json"
    everything = open_preset("coco", str(file), 30_000, seed=1)
    assert len(everything.captions) == 8
    assert "8 captions, all of which" in everything.warnings[0]
    (tmp_path / "coco" / "val2014").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"unpack val2014\.zip"):
        open_preset("coco", str(tmp_path / "coco"), 3, seed=1)
    with pytest.raises(UserError, match=r"annotations/captions_val2014\.json is missing"):
        open_preset("coco", str(tmp_path), 3, seed=1)


def test_cub_draws_of_the_test_part_and_names_what_is_missing(tmp_path: Path) -> None:
    root = tmp_path / "CUB_200_2011"
    images = [f"00{c}.Bird/{n}.png" for c in (1, 2) for n in (1, 2)]
    for number, image in enumerate(images):
        (root / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        noise(number).save(root / "images" / image)
    with pytest.raises(UserError, match=r"it lacks images\.txt, train_test_split\.txt"):
        open_preset("cub", str(tmp_path), 4, seed=0)
    (root / "images.txt").write_text("".join(f"{i} {image}\n" for i, image in enumerate(images, start=1)))
    with pytest.raises(UserError, match="text_c10"):
        open_preset("cub", str(tmp_path), 4, seed=0)
    for image in images:
        text = (root / "text_c10" / image).with_suffix(".txt")
        text.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(f"a bird {image}\nanother\n")
    with pytest.raises(UserError, match=r"train_test_split\.txt: is missing, and so is testclasses"):
        open_preset("cub", str(tmp_path), 4, seed=0)
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 0\n4 1\n")
    preset = open_preset("cub", str(tmp_path), 4, seed=0)
    assert preset.captions["2-1"] == f"a bird {images[1]}"
    assert set(preset.captions) == {"2-1", "2-2", "3-1", "3-2"}
    assert preset.reference == [root / "images" / images[1], root / "images" / images[2]]
    unique = open_preset("cub", str(tmp_path), None, seed=0)
    assert sorted(unique.captions.values()) == [f"a bird {images[1]}", f"a bird {images[2]}", "another"]
    assert unique.warnings == []
    (root / "testclasses.txt").write_text("002.Bird\n")
    assert open_preset("cub", str(tmp_path), 4, seed=0).reference == [root / "images" / i for i in images[2:]]
