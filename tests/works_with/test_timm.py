"""timm's vision transformers."""

import pytest
import torch
from side_by_side import assert_same, train, trained
from tiny import fill
from workflows import workflow

import lora_fast as lf

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
    config = peft.LoraConfig(r=4, target_modules=r"blocks\..*\.(qkv|proj|fc1|fc2)", modules_to_save=["head"])
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


@workflow("A vision transformer, merged and unmerged (`merge_adapter`)", "logits of each: 1e-12, float64")
def test_merged():
    def run(prepare):
        model = prepare(build()).eval()
        images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
        model.merge_adapter()
        merged = model(images)
        model.unmerge_adapter()
        return merged, model(images)

    assert_same(run, LAYERS, atol=1e-12)


@workflow(
    "BEiT, whose attention reads the weight of `qkv` without calling it", "`fuse_` leaves `qkv` alone, with the reason"
)
def test_weight_that_is_read():
    shape = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 4, "num_classes": 5}
    model = timm.models.beit.Beit(**shape)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["qkv", "fc1"]))
    report = lf.fuse_(model)
    assert list(report.left.values()) == ["Attention.forward reads its weight without calling it"]
    assert len(report.changed) == 1
