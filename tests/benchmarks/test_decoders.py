import decode_speed
import decoders
import pytest
import torch

from model import GPT, GPTConfig

CONFIG = GPTConfig(vocab_size=50, context_length=16, window=16, n_layer=2, n_head=4, n_kv_head=2, d_model=32)


@pytest.fixture(scope="module")
def model():
    return GPT(CONFIG, seed=0).eval()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("name", decoders.DECODERS)
def test_decoders_choose_the_likeliest_tokens(name, batch_size, model):
    if reason := decoders.why_not(name, CONFIG):
        pytest.skip(reason)
    assert decoders.objection(decoders.DECODERS[name], model, batch_size, 1e-4) is None


class SecondBest(decoders.GrowingCache):
    def take(self, count):
        for _ in range(count):
            new = self.logits[:, -1].topk(2).indices[:, 1:]
            self.tokens = torch.cat([self.tokens, new], dim=1)
            self.logits = self._read(new)


class OtherWindow(decoders.GrowingCache):
    def __init__(self, model, prompt, room):
        other = GPT(GPTConfig(**{**vars(model.config), "window": 12})).eval()
        other.load_state_dict(model.state_dict())
        super().__init__(other, prompt, room)


class OneTooFew(decoders.GrowingCache):
    def take(self, count):
        super().take(count - 1)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(SecondBest, "below the largest"), (OtherWindow, "below the largest"), (OneTooFew, "made tokens of shape")],
)
def test_a_wrong_decoder_is_refused(wrong, reason, model):
    assert reason in decoders.objection(wrong, model, 4, 1e-4, count=30)


def test_a_wrong_decoder_is_not_timed(model):
    rows = decode_speed.measure_point(model, {"wrong": SecondBest}, 1, (20, 30), torch.float32, 0)
    assert [row["position"] for row in rows] == [20, 30]
    assert all("failed the check" in row["not_timed"] and "median_ms" not in row for row in rows)


def test_the_growing_cache_grows_and_ours_does_not(model):
    prompt = torch.zeros(1, 20, dtype=torch.long)
    growing = decoders.GrowingCache(model, prompt, 10)
    growing.take(10)
    assert growing.keys[0].shape[2] == 30
    ours = decoders.Ours(model, prompt, 10)
    ours.take(10)
    assert torch.equal(ours.tokens, growing.tokens)


def test_bytes_of_a_step_are_the_weights_and_the_window():
    model = GPT(CONFIG)
    keys = 2 * 2 * 2 * 8  # keys and values, layers, KV heads, head size
    assert decode_speed.bytes_a_step(model, 3, 10_000) == 4 * (model.num_parameters() + 3 * 16 * keys)
    assert decode_speed.bytes_a_step(model, 3, 5) == 4 * (model.num_parameters() + 3 * 5 * keys)


def test_memory_is_looked_at_where_it_was_asked_for(model):
    looks = decode_speed.measure_memory(model, 5, 12)
    assert [look["position"] for look in looks] == [5, 12]
    assert all(10 < look["rss_mb"] < 100_000 for look in looks)
    assert looks[0]["seconds"] < looks[1]["seconds"]


def test_resident_bytes_see_an_allocation():
    before = decode_speed.resident_bytes()
    block = torch.ones(64 * 2**20, dtype=torch.int8)
    assert decode_speed.resident_bytes() - before == pytest.approx(block.nbytes, rel=0.2)
