"""The counter hash (golden words), the noise made from it, and the argmax that samples."""

import math

import pytest
import torch
from torch import Tensor

from specinfer_kernels import (
    ACCEPT,
    DRAFT,
    ORDER,
    RESIDUAL,
    TARGET,
    Backend,
    KernelInputError,
    Purpose,
    available_backends,
    counter_hash,
    draw_row,
    gumbel_noise,
    reference,
    sample_gumbel,
)

BACKENDS = available_backends()
MASK = (1 << 64) - 1
# Fixed for ever: a change of these words changes every sampled output of every seed.
GOLDEN = {
    (0, 0, 1): [6235967106033911276, 4964577235801436555, 5009519748041543987],
    (1, 7, 1): [-3726551795606520858, -9038970886729890344, 6255834278037402654],
    (-5, 1 << 40, 1): [-217999921120307200, 4640012956468807850, -8947580047882628801],
}


def mix(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def python_words(seed: int, position: int, purpose: int, vocab_size: int) -> list[int]:
    golden = 0x9E3779B97F4A7C15
    state = mix(mix((seed + golden * purpose) & MASK) ^ (position & MASK))
    words = [mix((state + golden * token) & MASK) for token in range(1, vocab_size + 1)]
    return [word - (1 << 64) if word >> 63 else word for word in words]


def all_false(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.bool)


def test_golden_words() -> None:
    for (seed, position, purpose), words in GOLDEN.items():
        got = counter_hash(torch.tensor([seed]), torch.tensor([position]), purpose, 3)
        assert got.tolist() == [words]


def test_hash_equals_python_integers() -> None:
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    positions = [0, 1, 5, 2**31, 2**63 - 1, 1000]
    for purpose in Purpose:
        got = counter_hash(torch.tensor(seeds), torch.tensor(positions), purpose, 21)
        expected = [
            python_words(seed, position, purpose, 21)
            for seed, position in zip(seeds, positions, strict=True)
        ]
        assert got.tolist() == expected


def test_purposes_positions_and_seeds_give_other_words() -> None:
    assert sorted((TARGET, ACCEPT, RESIDUAL, DRAFT, ORDER)) == [1, 2, 3, 4, 5]
    grid = [(seed, position) for seed in range(30) for position in range(30)]
    seeds, positions = (torch.tensor(column) for column in zip(*grid, strict=True))
    words = torch.stack([counter_hash(seeds, positions, purpose, 20) for purpose in Purpose])
    assert words.unique().numel() == words.numel()


def test_hash_bits_are_balanced() -> None:
    words = counter_hash(torch.arange(50), torch.arange(50), TARGET, 2000)
    for bit in range(64):
        share = ((words >> bit) & 1).double().mean().item()
        assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(words.numel())


def test_log_is_within_one_unit_in_the_last_place() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(20000, dtype=torch.float64, generator=generator) + 1e-300
    values = torch.cat((values, values * 37, 1 - values * 1e-9, torch.tensor([1.0, 2.0**-53])))
    error = (reference.exact_log(values) - values.log()).abs()
    assert bool((error <= 2 * 2.0**-52 * values.log().abs()).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_is_gumbel(backend: Backend) -> None:
    noise = gumbel_noise(torch.arange(100), torch.arange(100), 5000, backend=backend)
    assert noise.dtype == torch.float64
    assert bool(noise.isfinite().all())
    count = noise.numel()
    deviation = math.pi / math.sqrt(6)
    assert abs(noise.mean().item() - 0.5772156649) < 4 * deviation / math.sqrt(count)
    assert abs(noise.std().item() - deviation) < 0.02
    # Kolmogorov's distance to exp(-exp(-x)).
    ordered = torch.exp(-torch.exp(-noise.flatten().sort().values))
    distance = (ordered - (torch.arange(count) + 0.5) / count).abs().max().item()
    assert distance < 1.95 / math.sqrt(count)


def test_noise_has_the_same_bits_in_every_backend_and_batch() -> None:
    seeds, positions = torch.arange(7) * 31, torch.arange(7) + 1000
    expected = reference.gumbel_noise(seeds, positions, 1003, TARGET)
    for backend in BACKENDS:
        assert torch.equal(gumbel_noise(seeds, positions, 1003, backend=backend), expected)
        for row in range(7):
            alone = gumbel_noise(
                seeds[row : row + 1], positions[row : row + 1], 1003, backend=backend
            )
            assert torch.equal(alone[0], expected[row])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_words_and_noise_have_the_same_bits_on_a_gpu() -> None:
    seeds = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 123456789])
    positions = torch.tensor([0, 1, 5, 2**31, 2**63 - 1, 1000])
    for purpose in Purpose:
        words = counter_hash(seeds.cuda(), positions.cuda(), purpose, 1000)
        assert torch.equal(words.cpu(), counter_hash(seeds, positions, purpose, 1000))
    noise = gumbel_noise(seeds.cuda(), positions.cuda(), 1000)
    assert torch.equal(noise.cpu(), gumbel_noise(seeds, positions, 1000))


def test_noise_of_extreme_words_is_finite() -> None:
    words = torch.tensor([0, -1, 2**63 - 1, -(2**63), 1 << 11])
    assert bool(reference.gumbel_from_words(words).isfinite().all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_samples_follow_the_law(backend: Backend) -> None:
    law = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=torch.float64)
    count = 20000
    logits = law.log().expand(count, 5)
    tokens = sample_gumbel(
        logits, torch.full((count,), 9), torch.arange(count), all_false(count), backend=backend
    )
    seen = torch.bincount(tokens, minlength=5).double()
    chi_square = ((seen - count * law) ** 2 / (count * law)).sum().item()
    assert chi_square < 18.47  # 4 degrees of freedom, p = 0.001
    # The test has power: a law off by a twentieth is told apart.
    wrong = torch.tensor([0.38, 0.27, 0.2, 0.1, 0.05], dtype=torch.float64)
    assert ((seen - count * wrong) ** 2 / (count * wrong)).sum().item() > 18.47


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 30.0, 1e7])
def test_native_choice_is_the_references(dtype: torch.dtype, spread: float) -> None:
    if "native" not in BACKENDS:
        pytest.skip("no native library here")
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(300, 1013, generator=generator, dtype=torch.float64) * spread).to(dtype)
    logits[::3, 5:900] = -math.inf
    logits[1::7, ::2] = math.nan
    logits[5] = -math.inf
    logits[6] = math.nan
    logits[7, :500], logits[7, 500:] = math.nan, -math.inf
    logits[8, 700] = math.inf
    seeds, positions = torch.arange(300) * 7, torch.arange(300)
    greedy = torch.arange(300) % 5 == 0
    native = sample_gumbel(logits, seeds, positions, greedy, backend="native")
    plain = sample_gumbel(logits, seeds, positions, greedy, backend="reference")
    assert torch.equal(native, plain)
    assert native[[5, 6, 7, 8]].tolist() == [0, 0, 0, 700]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_choice_is_the_argmax_of_logits_and_noise(backend: Backend) -> None:
    logits = torch.randn(20, 77, generator=torch.Generator().manual_seed(0))
    seeds, positions = torch.arange(20), torch.arange(20) + 4
    tokens = sample_gumbel(logits, seeds, positions, all_false(20), backend=backend)
    expected = (logits.double() + gumbel_noise(seeds, positions, 77)).argmax(1)
    assert torch.equal(tokens, expected)
    greedy = sample_gumbel(logits, seeds, positions, ~all_false(20), backend=backend)
    assert torch.equal(greedy, logits.argmax(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lowest_index_wins_ties(backend: Backend) -> None:
    logits = torch.zeros(2, 40)
    logits[0, [9, 17, 39]] = 3.0
    logits[1, [38, 39]] = 3.0
    rows = torch.zeros(2, dtype=torch.int64)
    assert sample_gumbel(logits, rows, rows, ~all_false(2), backend=backend).tolist() == [9, 38]
    infinite = torch.full((1, 40), -math.inf)
    infinite[0, [11, 30]] = math.inf
    row = torch.zeros(1, dtype=torch.int64)
    assert sample_gumbel(infinite, row, row, all_false(1), backend=backend).tolist() == [11]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_is_sampled_alike_in_any_batch(backend: Backend) -> None:
    wide = torch.randn(9, 130, generator=torch.Generator().manual_seed(0))
    logits = wide[:, :101]  # rows that do not lie side by side
    seeds, positions = torch.arange(9), torch.arange(9)
    together = sample_gumbel(logits, seeds, positions, all_false(9), backend=backend)
    for row in range(9):
        part = slice(row, row + 1)
        alone = sample_gumbel(
            logits[part], seeds[part], positions[part], all_false(1), backend=backend
        )
        assert alone.tolist() == together[part].tolist()
    none = slice(0, 0)
    empty = sample_gumbel(logits[none], seeds[none], positions[none], all_false(0))
    assert empty.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [1, 7, 77, 1030])
def test_one_row_is_drawn_as_among_others(
    backend: Backend, dtype: torch.dtype, vocab_size: int
) -> None:
    laws = torch.randn(30, vocab_size, dtype=dtype, generator=torch.Generator().manual_seed(0))
    laws[laws < -1] = -math.inf
    seeds, positions = torch.arange(30) - 15, (torch.arange(30) << 35) + 2
    for greedy in (False, True):
        expected = sample_gumbel(
            laws, seeds, positions, torch.full((30,), greedy), backend="reference"
        )
        drawn = [
            draw_row(law, seed, position, greedy=greedy, backend=backend)
            for law, seed, position in zip(laws, seeds.tolist(), positions.tolist(), strict=True)
        ]
        assert drawn == expected.tolist()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_with_a_nan_anywhere_draws_nothing(backend: Backend) -> None:
    for place in range(37):
        law = torch.randn(37, generator=torch.Generator().manual_seed(place))
        law[(place + 1) % 37], law[(place + 2) % 37] = math.inf, -math.inf
        assert draw_row(law, 1, 2, greedy=True, backend=backend) == (place + 1) % 37
        law[place] = math.nan
        for greedy in (False, True):
            assert draw_row(law, 1, 2, greedy=greedy, backend=backend) is None


@pytest.mark.parametrize(("seed", "position"), [(1 << 63, 0), (0, 1 << 63), (-(1 << 63) - 1, 0)])
def test_refuses_numbers_of_more_than_64_bits(seed: int, position: int) -> None:
    with pytest.raises(KernelInputError, match="64 bits"):
        draw_row(torch.zeros(5), seed, position, greedy=False)


def test_refuses_rows_that_are_none() -> None:
    for law in (
        torch.zeros(2, 5),
        torch.zeros(0),
        torch.zeros(5).bfloat16(),
        torch.zeros(5, 2)[:, 0],
    ):
        with pytest.raises(KernelInputError):
            draw_row(law, 1, 2, greedy=False)


def test_refuses_bad_input() -> None:
    logits, row, greedy = torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), all_false(2)
    for arguments in (
        (logits.bfloat16(), row, row, greedy),
        (logits[0], row, row, greedy),
        (logits[:, :0], row, row, greedy),
        (logits, row[:1], row[:1], greedy),
        (logits, row, row[:1], greedy),
        (logits, row.int(), row, greedy),
        (logits, row, row, greedy.int()),
    ):
        with pytest.raises(KernelInputError):
            sample_gumbel(*arguments)
    with pytest.raises(KernelInputError):
        counter_hash(row, row, TARGET, 0)
