"""The search for tiles: its candidates, its choice, and the table that it writes."""

import re

import pytest
import torch
import tune_tiles
from test_speed_of_light import FORWARD_TILE, Made
from tune_tiles import candidates

from kernels.backends.triton import tile_configs
from kernels.backends.triton.tile_configs import RowTile

CELL = tune_tiles.Cell("sm_90", "forward", torch.bfloat16, 128)


def test_the_search_takes_the_best_of_those_that_do_not_spill(monkeypatch):
    fast, good, slow = (RowTile(128, 32, step, 8, 2) for step in (128, 64, 32))
    ms = {fast: 1.0, good: 2.0, slow: 3.0}

    def spilled(tile, features):  # the fastest spills only where there is everything
        return 40 if tile == fast and features.get("softcap") else 0

    class Compiled:
        def __init__(self, tile, features):
            self.spilled_bytes, self.stack_bytes, self.blocks_per_multiprocessor = spilled(tile, features), 0, 1

    monkeypatch.setattr(tune_tiles, "candidates", lambda *cell: [fast, good])
    monkeypatch.setattr(tune_tiles, "tile_config", lambda *cell: slow)  # what the table has
    monkeypatch.setattr(tune_tiles, "weigh", lambda cell, tile: tune_tiles.Candidate(tile, 0, True, ms[tile]))
    monkeypatch.setattr(tune_tiles, "compile_tile", lambda cell, tile, features: Compiled(tile, features))
    chosen, tried = tune_tiles.choose(CELL)
    assert chosen.tile == good and [one.tile for one in tried] == [slow, fast, good]
    ms[slow] = 2.4  # not a quarter worse: it stays
    assert tune_tiles.choose(CELL)[0].tile == slow
    monkeypatch.setattr(tune_tiles, "weigh", lambda cell, tile: tune_tiles.Candidate(tile, 0, False, 1.0))
    with pytest.raises(ValueError, match="no candidate fits Cell"):
        tune_tiles.choose(CELL)


def test_several_programs_on_a_multiprocessor_come_nearer_to_the_overlapped_bound():
    one, four = (Made("attention_forward", FORWARD_TILE, {"FMNMX": 300}, blocks=blocks) for blocks in (1, 4))
    assert tune_tiles.expected_ms(four, CELL) < tune_tiles.expected_ms(one, CELL)


@pytest.mark.parametrize("element_bytes", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 256])
def test_candidates_can_be_tiles(head_dim, element_bytes):
    for name in tune_tiles.KERNELS:
        found = candidates(name, head_dim, element_bytes)
        assert len(found) == len(set(found)) > 3
        for tile in found:
            assert all(number & (number - 1) == 0 for number in tile[:-1]) and min(tile[:-2]) >= 16  # of a product
            assert name == "decode" or tile[2] % tile[1] == 0


def test_bad_entries_are_named():
    with pytest.raises(ValueError, match="head size 257 is not 1 to 256"):
        candidates("forward", 257, 2)
    with pytest.raises(ValueError, match="there is no pass 'sideways'"):
        candidates("sideways", 64, 2)


def test_a_decode_tile_is_checked_with_all_its_rows_and_both_16_bit_dtypes():
    checks = tune_tiles.checks(CELL._replace(name="decode"))
    assert {cell.dtype for cell, _ in checks} == {torch.bfloat16, torch.float16}
    assert [features for cell, features in checks if cell.dtype == torch.bfloat16] == [tune_tiles.EVERYTHING, {}]
    assert len(tune_tiles.checks(CELL._replace(target="sm_86", dtype=torch.float32))) == 1


def test_the_table_is_rewritten_as_code():
    row = {"target": "sm_90", "pass": "forward", "dtype": "bf16", "tile": [64, 16, 32, 4, 5]}
    rows = [{**row, "head_dim": 96}, {**row, "head_dim": 128}]
    source = "before = 1\nCONFIGS = {\n    (1, 2): {},\n}\nafter = 2\n"
    text = tune_tiles.rewritten(source, rows)
    found = dict(vars(tile_configs))
    exec(text, found)
    assert found["before"] == 1 and found["after"] == 2
    changed = found["CONFIGS"]["forward", 2][90]
    assert changed[128] == RowTile(64, 16, 32, 4, 5) and 96 not in changed  # the same as for 128
    # whatever the rows did not name is looked up as before, for all families and head sizes
    for key, by_family in tile_configs.CONFIGS.items():
        for family in tile_configs.FAMILIES:
            for head_dim in tune_tiles.HEAD_DIMS:
                before = tune_tiles.in_table(by_family, family, head_dim)
                after = tune_tiles.in_table(found["CONFIGS"][key], family, head_dim)
                named = (*key, family) == ("forward", 2, 90) and head_dim in (96, 128)
                assert after == (RowTile(64, 16, 32, 4, 5) if named else before)


def test_a_family_whose_tiles_are_those_of_the_next_family_is_left_out():
    ampere = {
        head_dim: tune_tiles.in_table(tile_configs.CONFIGS["dq", 2], 80, head_dim) for head_dim in tune_tiles.HEAD_DIMS
    }
    rows = [
        {"target": target, "pass": "dq", "dtype": "bf16", "tile": list(ampere[head_dim]), "head_dim": head_dim}
        for target in ("sm_90", "sm_100") for head_dim in ampere
    ]  # fmt: skip
    found = dict(vars(tile_configs))
    exec(tune_tiles.rewritten("CONFIGS = {\n}\n", rows), found)
    assert not {90, 100} & found["CONFIGS"]["dq", 2].keys()
    with pytest.raises(ValueError, match="has no table"):
        tune_tiles.rewritten("CONFIG = 1", rows)


def test_a_table_without_changes_is_written_as_it_stands():
    source = tune_tiles.TABLE.read_text()
    assert tune_tiles.rewritten(source, []) == source
    assert re.search(r"# fmt: off\nCONFIGS = \{\n.*\n\}\n# fmt: on\n", source, re.DOTALL)
