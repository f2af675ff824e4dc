"""Portable libraries: the highest level a processor has, never one of other sources, same bits."""

import platform
import stat
from pathlib import Path

import pytest
import torch

from specinfer_kernels import (
    AttentionLayout,
    native,
    pack_linear,
    prebuilt,
    sample_gumbel,
    tree_attention,
)
from specinfer_kernels.prebuilt import LEVELS, build_all, find_prebuilt, processor_features
from tests.kernels.test_backends import COPY, fake_compiler, use_compilers

x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the levels of this test are x86's")


@x86
def test_a_processor_gets_the_highest_level_that_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compilers(monkeypatch, fake_compiler(tmp_path / "bin", COPY))
    folder = tmp_path / "prebuilt"
    v4, v3 = build_all(folder)
    levels = LEVELS["x86_64"]
    assert "x86-64-v4" in v4.name
    assert stat.S_IMODE(folder.stat().st_mode) & 0o005 == 0o005, "an image's user reads them"
    assert find_prebuilt(folder, levels["x86-64-v4"] | {"sse"}) == v4
    assert find_prebuilt(folder, levels["x86-64-v3"]) == v3
    assert find_prebuilt(folder, levels["x86-64-v4"] - {"avx512vl"}) == v3
    assert find_prebuilt(folder, frozenset({"sse"})) is None
    v4.unlink()
    assert find_prebuilt(folder, levels["x86-64-v4"]) == v3


@x86
def test_a_library_of_other_sources_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_compilers(monkeypatch, fake_compiler(tmp_path / "bin", COPY))
    build_all(tmp_path / "prebuilt")
    sources = tmp_path / "csrc"
    sources.mkdir()
    (sources / "kernels.cpp").write_text("// changed")
    monkeypatch.setattr(prebuilt, "SOURCE_FOLDER", sources)
    assert find_prebuilt(tmp_path / "prebuilt", LEVELS["x86_64"]["x86-64-v4"]) is None


def outputs() -> list[torch.Tensor]:
    """Attention of a chain of five rows after three blocks, tokens of noise, and a product."""
    generator = torch.Generator().manual_seed(7)
    keys, values = torch.randn(2, 4, 16, 2, 64, generator=generator)
    rows = 5
    layout = AttentionLayout(
        row_offsets=torch.tensor([0, rows], dtype=torch.int32),
        context_lens=torch.tensor([40], dtype=torch.int32),
        block_tables=torch.tensor([[2, 0, 3, 1]], dtype=torch.int32),
        ancestors=torch.tensor([[2 ** (row + 1) - 1] for row in range(rows)]),
    )
    query = torch.randn(rows, 4, 64, generator=generator)
    attended = tree_attention(query, keys, values, layout, scale=0.125, backend="native")
    words = torch.arange(rows)
    logits = torch.randn(rows, 1000, generator=generator)
    tokens = sample_gumbel(logits, words, words, torch.zeros(rows, dtype=torch.bool))
    weight = torch.randn(70, 96, generator=generator).bfloat16()
    product = pack_linear(weight, layout="native")(query.view(10, 128)[:, :96].bfloat16())
    return [attended, tokens, product]


def test_prebuilt_and_own_build_have_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = outputs()
    build_all(tmp_path)
    found = find_prebuilt(tmp_path, processor_features())
    if found is None:
        pytest.skip("no level fits this processor")
    monkeypatch.setattr(prebuilt, "PREBUILT_FOLDER", tmp_path)
    native._load.cache_clear()
    try:
        assert native._library()._name == str(found)
        assert all(torch.equal(*pair) for pair in zip(own, outputs(), strict=True))
    finally:
        native._load.cache_clear()
