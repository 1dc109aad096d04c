"""Figures of ``make demo-tokenizer`` that need no training."""

import torch

from mmpost.cli.demo_tokenizer import _changed
from mmpost_tokenizers.cnn import CNNConfig, CNNTokenizer
from mmpost_tokenizers.quantizers.configs import VQConfig


def test_share_of_changed_tokens_is_drawn_by_the_seed(tmp_path):
    torch.set_num_threads(1)
    config = CNNConfig(
        image_size=8, quantizer=VQConfig(codebook_size=128, dim=4), block_out_channels=(8,), layers_per_block=1,
        z_channels=8, stem_patch=4, norm_groups=4, lowest_attention=False, mid_attention=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        CNNTokenizer(config).save_pretrained(tmp_path)
    found = [_changed(tmp_path, seed) for seed in (0, 1, 2)]
    assert _changed(tmp_path, 0) == found[0]
    assert len({row["share"] for row in found}) == 3
    for row in found:
        # 100 neighbours at 4096 codes are 3 at 128: alpha * beta * (1 - 1 / delta).
        assert row["expected"] == 1.0 * 0.5 * (1 - 1 / 3)
        assert abs(row["share"] - row["expected"]) < row["half_width_99"]
        assert 0.005 < row["half_width_99"] < 0.03
