import loss_speed
import pytest
import torch

SHAPE = loss_speed.Shape(40, 500, 16)
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_contestant_is_right_or_says_why_it_is_not_there(dtype):
    for row in loss_speed.measure_point(SHAPE, loss_speed.CONTESTANTS, dtype, CPU, 0):
        assert ("median_ms" in row and row["peak_mb"] > 0) or row["not_timed"] == loss_speed.WHY_NOT_TORCH is not None


def test_a_loss_with_another_gradient_is_refused():
    def wrong(x, weight, targets):
        return loss_speed.plain(x, weight.detach(), targets) + 0 * weight.sum()

    (row,) = loss_speed.measure_point(SHAPE, {"wrong": (wrong, None)}, torch.float32, CPU, 0)
    assert row["not_timed"].startswith("failed the check: dweight is off by") and "median_ms" not in row


@pytest.mark.parametrize("text", ["2048,50257", "2048,50257,0", "a,b,c"])
def test_a_shape_that_is_none_is_said(text):
    with pytest.raises(loss_speed.harness.BadInput, match="wanted T,V,C"):
        loss_speed.parse(text)
