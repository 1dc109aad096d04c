"""Options of the tokenizer commands: shipped recipes, overrides, messages with file and line."""

import pytest

from mmpost.config.load import load
from mmpost.core.errors import ManyErrors, MmpostError
from mmpost_tokenizers.bridge.options import BridgeRunConfig
from mmpost_tokenizers.options import GeneratorRunConfig, PosttrainConfig, TokenizerConfig

RECIPES = {
    "tokenizers/demo": TokenizerConfig, "tokenizers/robustok_imagenet256": TokenizerConfig,
    "tokenizers/xqgan_imagenet256": TokenizerConfig, "tokenizers/llamagen_vq16_imagenet256": TokenizerConfig,
    "tokenizers/titok_imagenet256": TokenizerConfig, "tokenizers/posttrain_demo": PosttrainConfig,
    "tokenizers/posttrain_imagenet256": PosttrainConfig, "tokenizers/generator_demo": GeneratorRunConfig,
    "tokenizers/generator_llamagen_b": GeneratorRunConfig, "tokenizers/generator_llamagen_l": GeneratorRunConfig,
    "tokenizers/generator_400m": GeneratorRunConfig, "tokenizers/bridge_demo": BridgeRunConfig,
    "tokenizers/bridge_mar_l_imagenet256": BridgeRunConfig, "tokenizers/bridge_mar_h_imagenet256": BridgeRunConfig,
    "tokenizers/bridge_mar_l_independent_imagenet256": BridgeRunConfig,
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_shipped_recipes_load_and_come_back(name, tmp_path):
    config = load(RECIPES[name], [name], []).config
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load(RECIPES[name], [tmp_path / "again.yaml"], []).config == config


def test_robustok_has_the_papers_numbers():
    config = load(TokenizerConfig, ["tokenizers/robustok_imagenet256"], []).config
    perturb, losses, train = config.tokenizer.perturb, config.losses, config.train
    assert (perturb.alpha, perturb.beta, perturb.delta, perturb.end_ratio) == (1.0, 0.1, 100, 0.5)
    # Epochs 40, 120 and 56 of 200.
    assert [200 * share for share in (perturb.anneal_start, perturb.anneal_end)] == [40, 120]
    assert 200 * losses.adversarial_start == pytest.approx(56)
    assert (losses.adversarial, losses.lecam, losses.semantic, losses.perceptual_weight) == (0.5, 1e-3, 0.1, 1.0)
    assert train.learning_rate == pytest.approx(3e-5 * train.batch_size / 128)
    assert (train.batch_size, train.num_train_epochs, train.max_grad_norm) == (1024, 200, 0)
    baseline = load(TokenizerConfig, ["tokenizers/xqgan_imagenet256"], []).config
    assert set(baseline.diff(config)) == {"tokenizer.perturb.beta"}


def test_robustok_and_llamagen_have_the_published_sizes():
    import torch

    from mmpost_tokenizers import opening

    shapes = {"robustok_imagenet256": "vit", "llamagen_vq16_imagenet256": "cnn"}
    counts = {}
    for name in shapes:
        settings = load(TokenizerConfig, [f"tokenizers/{name}"], ["tokenizer.image_size=256"]).config.tokenizer
        if settings.kind == "vit":
            settings = settings.model_copy(update={"pretrained": False})
        with torch.device("meta"):
            counts[name] = sum(weight.numel() for weight in opening.new_tokenizer(settings, seed=0).parameters())
    assert counts["llamagen_vq16_imagenet256"] == 71_883_403
    assert 170e6 < counts["robustok_imagenet256"] < 180e6


def test_bridge_recipes_have_the_published_sizes():
    """486M and 910M weights with the heads of 65M and 94M, counted without memory."""
    import torch

    from mmpost_tokenizers.bridge.head import HeadConfig
    from mmpost_tokenizers.bridge.masked import SIZES
    from mmpost_tokenizers.bridge.running import HEADS

    for name, size, published in (("l", "L", 486e6), ("h", "H", 910e6)):
        model = load(BridgeRunConfig, [f"tokenizers/bridge_mar_{name}_imagenet256"], []).config.model
        shape = SIZES[size]
        assert (model.width, model.depth, model.heads) == (shape.width, shape.encoder_depth, shape.heads)
        assert (model.buffer, model.mask_min, model.mask_std) == (shape.buffer, shape.mask_min, shape.mask_std)
        with torch.device("meta"):
            from mmpost_tokenizers.bridge.masked import MaskedBackbone

            head = HEADS[model.head](
                HeadConfig(z_dim=model.width, width=model.head_width, depth=model.head_depth, heads=model.head_heads)
            )
            parts = [MaskedBackbone(shape), head]
        count = sum(weight.numel() for part in parts for weight in part.parameters())
        assert count == pytest.approx(published, rel=0.02)
    independent = load(BridgeRunConfig, ["tokenizers/bridge_mar_l_independent_imagenet256"], []).config
    whole = load(BridgeRunConfig, ["tokenizers/bridge_mar_l_imagenet256"], []).config
    assert list(whole.diff(independent)) == ["model.head"]


def test_the_command_line_changes_one_kind_at_a_time():
    words = ["tokenizer.quantizer.kind=fsq", "tokenizer.quantizer.levels=[5, 5]", "beta=0.25", "data.train=imgs/"]
    loaded = load(TokenizerConfig, ["tokenizers/demo"], words)
    assert loaded.config.tokenizer.quantizer.levels == [5, 5]
    assert loaded.config.tokenizer.perturb.beta == 0.25
    assert loaded.config.data.train[0].path == "imgs/"
    assert loaded.sources["tokenizer.perturb.beta"] == "command line"
    assert loaded.sources["train.max_steps"].startswith("configs/tokenizers/demo.yaml:")


def test_messages_name_file_and_line(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("tokenizer:\n  perturb:\n    betta: 0.5\n    alpha: 1.5\nlosses: {perceptual: vgg}\n")
    with pytest.raises(ManyErrors) as caught:
        load(TokenizerConfig, [file], [])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(
        f"{file}:3: unknown key 'tokenizer.perturb.betta'; did you mean 'tokenizer.perturb.beta'?"
    )
    assert lines[1].startswith(f"{file}:4: tokenizer.perturb.alpha: expected")
    assert lines[2].startswith(f"{file}:5: losses.perceptual: expected")


def test_annealing_must_run_forward():
    with pytest.raises(MmpostError) as caught:
        TokenizerConfig(tokenizer={"kind": "cnn", "perturb": {"anneal_start": 0.5, "anneal_end": 0.25}})
    assert str(caught.value) == (
        "tokenizer.perturb.anneal_end=0.25 lies before anneal_start=0.5. "
        "Swap them, or set tokenizer.perturb.end_ratio=1 for no annealing. [MMP-C110]"
    )
