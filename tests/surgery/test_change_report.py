"""Report: the summary that it prints."""

import lora_fast as lf


def test_report_groups_many_names():
    report = lf.Report("fused", {"a": ""}, {f"block.{i}": "hooks" for i in range(6)} | {"head": "tied"})
    assert str(report) == "fused 1 layer; left 6: block.0, block.1, block.2, block.3 and 2 more (hooks); 1: head (tied)"
