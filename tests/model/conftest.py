import pytest


@pytest.fixture
def calls(monkeypatch):
    """Which ran since the last clear(), in every layer: "sliding_gqa_attention" or "_masked_attention"."""
    from model.huggingface import attention

    counted = []
    for name in ("sliding_gqa_attention", "_masked_attention"):
        function = getattr(attention, name)

        def count(*args, name=name, function=function, **kwargs):
            counted.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(attention, name, count)
    return counted
