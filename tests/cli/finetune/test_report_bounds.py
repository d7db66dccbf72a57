"""The figures of norm-bounded layers."""

from lora_fast.cli.finetune import report_bounds


def test_places_are_kind_and_depth_of_each_layer():
    names = ["model.layers.0.mlp.up", "model.layers.10.mlp.up", "model.layers.0.attn.q"]
    assert list(report_bounds._places(names).values()) == [("mlp.up", 0), ("mlp.up", 10), ("attn.q", 0)]
    assert report_bounds._places(["head"]) == {"head": ("head", 0)}
    assert list(report_bounds._places(["e.0.x", "d.0.x"]).values()) == [("e.x", 0), ("d.x", 0)]
