"""timm's vision transformers."""

import pytest
import torch
from side_by_side import assert_same, train, trained
from tiny import fill
from workflows import workflow

timm = pytest.importorskip(
    "timm", reason="pip install '.[works-with]' and a torchvision for this torch", exc_type=ImportError
)
peft = pytest.importorskip("peft", reason="pip install '.[works-with]'")

LIBRARY = "timm"
LAYERS = 8  # four in each of two blocks


def build():
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
    model = timm.models.vision_transformer.VisionTransformer(**shape).double()
    config = peft.LoraConfig(r=4, target_modules=["qkv", "proj", "fc1", "fc2"], modules_to_save=["head"])
    config.target_modules = r"blocks\..*\.(qkv|proj|fc1|fc2)"
    return fill(peft.get_peft_model(model, config))


def loss_of(model, step):
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    return torch.nn.functional.cross_entropy(model(images), torch.tensor([0, 3, 4]))


@workflow("A vision transformer, its head in `modules_to_save`", "losses, factors and head: 1e-12, float64")
def test_training():
    def run(prepare):
        model = prepare(build())
        return train(model, loss=loss_of), trained(model)

    assert_same(run, LAYERS, atol=1e-12)


@workflow("A vision transformer, merged (`merge_and_unload`)", "logits: 1e-12, float64")
def test_merged():
    def run(prepare):
        model = prepare(build()).eval()
        images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
        adapted = model(images)
        torch.testing.assert_close(model.merge_and_unload()(images), adapted, atol=1e-9, rtol=0)
        return adapted

    assert_same(run, LAYERS, atol=1e-12)
