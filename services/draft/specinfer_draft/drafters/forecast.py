"""What the target will draw, forecast from a drafter's logits.

The target decides position t by argmax_v(l_v / T + g(seed, t, v)), with its own logits l, and
drops the noise g when T is 0. A drafter that knows seed and sampling ranks tokens by

    z_v = l_v + T * g(seed, t, v)              "shared noise", algorithms.md 1.6

with its own logits in place of the target's: the same order, and one formula for every T. When the
difference between the two models' logits is modelled as Gumbel noise of scale s, the probability
that the target picks v given the shared g is exactly softmax(z / s)_v, which is the score used
here; at T = 0 and s = 1 that is the drafter's own probability q.

A grammar's mask, penalties, bias and cuts are applied as the target applies them, but in float32,
for many rows at once, and what ties with the last token kept stays: this only has to agree often.
Knows no model, tree or session.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from specinfer.errors import InvalidRequest
from specinfer.grammar import GrammarState
from specinfer.sampling import SamplingParams
from specinfer_draft.grow import Candidates
from specinfer_engine.grammar import allowed_tokens
from specinfer_kernels import gumbel_noise, rank_tokens

log = logging.getLogger(__name__)

# top-p looks at this many of the best tokens first and sorts all only where they hold too little.
_TOP_P_TOKENS = 256
MAX_NOISE_BYTES = 64 * 1024 * 1024
# Trees of several hundred sessions; a small vocabulary would else fill the bytes with what is over.
MAX_NOISE_ROWS = 4096
# Of so few tokens a call costs as much as the noise of several positions, and texts go on: of 3,072
# tokens a position takes 0.12 ms alone and half of that among eight.
SMALL_VOCABULARY = 4096
NOISE_AHEAD = 7


@dataclass(frozen=True)
class Cuts:
    """How far the target's law is cut, at its temperature; the fields are those of its sampling."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float

    @classmethod
    def of(cls, sampling: SamplingParams) -> Cuts | None:
        """The cuts of a sampling, or None where nothing is cut."""
        uncut = sampling.top_k == 0 and sampling.top_p == 1.0 and sampling.min_p == 0.0
        if sampling.greedy or uncut:
            return None
        return cls(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)


class NoiseCache:
    """Noise of positions that are likely to be asked for again: a tree's, and the next one's.

    It depends on nothing but seed, temperature and position. All sessions share the room, so that
    what idle ones leave behind is bounded.

    Args:
        vocab_size: tokens of the model.
        device: where the noise is wanted.
        max_bytes: most memory kept, but for one row.
    """

    def __init__(
        self,
        vocab_size: int,
        device: torch.device | str = "cpu",
        max_bytes: int = MAX_NOISE_BYTES,
    ) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._max_rows = max(1, min(MAX_NOISE_ROWS, max_bytes // (4 * vocab_size)))
        self._num_ahead = NOISE_AHEAD if vocab_size <= SMALL_VOCABULARY else 0
        self._rows: OrderedDict[tuple[int, float, int], Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def scaled(self, sampling: SamplingParams, positions: Sequence[int]) -> dict[int, Tensor]:
        """T * g of each position, float32 [vocab_size]."""
        seed, temperature = sampling.seed, sampling.temperature
        wanted = sorted(set(positions))
        fresh = [position for position in wanted if (seed, temperature, position) not in self._rows]
        if fresh:
            ahead = range(wanted[-1] + 1, wanted[-1] + 1 + self._num_ahead)
            fresh += [each for each in ahead if (seed, temperature, each) not in self._rows]
            seeds = torch.full((len(fresh),), seed, dtype=torch.int64)
            noise = gumbel_noise(seeds, torch.tensor(fresh, dtype=torch.int64), self._vocab_size)
            scaled = (noise * temperature).float().to(self._device)
            for position, row in zip(fresh, scaled, strict=True):
                # A copy, for a view would keep the whole batch.
                self._rows[(seed, temperature, position)] = row.clone() if len(fresh) > 1 else row
        found = {position: self._rows[(seed, temperature, position)] for position in wanted}
        for position in wanted:
            self._rows.move_to_end((seed, temperature, position))
        while len(self._rows) > self._max_rows:
            self._rows.popitem(last=False)
        return found


class DrawForecast:
    """How one session's target draws, as far as a drafter can know it.

    Args:
        sampling: the target's parameters.
        vocab_size: tokens of the model.
        num_prompt_tokens: presence and frequency penalties count the tokens after these.
        grammar: a state of this session alone, for what its output has to match, or None.
        noise: keeps noise for all sessions of a drafter; None makes one for this session alone.

    Attributes:
        sampling: as given.
        cuts: those of the sampling.

    Raises:
        InvalidRequest: when a bias names a token outside the vocabulary.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        vocab_size: int,
        num_prompt_tokens: int,
        device: torch.device | str = "cpu",
        grammar: GrammarState | None = None,
        noise: NoiseCache | None = None,
    ) -> None:
        if any(token_id >= vocab_size for token_id in sampling.logit_bias):
            raise InvalidRequest(
                f"logit_bias names a token outside the vocabulary of {vocab_size}",
                field="logit_bias",
            )
        self.sampling = sampling
        self.cuts = Cuts.of(sampling)
        self._vocab_size = vocab_size
        self._num_prompt_tokens = num_prompt_tokens
        self._device = device
        self._grammar = grammar
        self._output: list[int] = []
        self._noise = NoiseCache(vocab_size, device) if noise is None else noise
        self._seen = torch.empty(0, dtype=torch.bool)  # [vocab_size], prompt and output
        self._counts = torch.empty(0)  # float32 [vocab_size], output
        bias = sampling.logit_bias
        self._bias_ids = torch.tensor(list(bias), dtype=torch.int64, device=device)
        self._biases = torch.tensor(list(bias.values()), dtype=torch.float32, device=device)

    @property
    def looks_back(self) -> bool:
        """Whether z depends on the tokens before a row otherwise than through its logits, or is
        more than a cut and noise."""
        return self._grammar is not None or self.sampling.penalised or len(self._bias_ids) > 0

    def begin(self, token_ids: Sequence[int]) -> None:
        """Take the committed tokens, root included, that the next rows come after."""
        if self._grammar is not None:
            self._output = list(token_ids[self._num_prompt_tokens :])
        if self.sampling.penalised:
            tokens = torch.tensor(token_ids, dtype=torch.int64, device=self._device)
            output = tokens[self._num_prompt_tokens :]
            self._seen = torch.bincount(tokens, minlength=self._vocab_size) > 0
            self._counts = torch.bincount(output, minlength=self._vocab_size).float()

    def forecast(
        self, logits: Tensor, paths: Sequence[Sequence[int]], positions: Sequence[int]
    ) -> Tensor:
        """z of every row, float32 [num_rows, vocab_size]; -inf for what cannot be drawn.

        Args:
            logits: the drafter's raw logits, any float [num_rows, vocab_size]; not changed.
            paths: drafted tokens between the root and each row, the row's own included.
            positions: absolute position of the token that each row decides.
        """
        sampling, logits = self.sampling, logits.float()
        if self._grammar is not None:
            allowed = torch.stack([self._allowed(self._grammar, path) for path in paths])
            logits = logits.masked_fill(~allowed.to(logits.device), -math.inf)
        if sampling.penalised:
            logits = self._penalise(logits, paths)
        if len(self._bias_ids):
            logits = logits.index_add(1, self._bias_ids, self._biases.expand(len(logits), -1))
        if self.cuts is not None:
            logits = cut(logits, self.cuts)
        return logits if sampling.greedy else logits + self._scaled_noise(positions)

    def _allowed(self, grammar: GrammarState, path: Sequence[int]) -> Tensor:
        """Tokens that may follow a path, bool [vocab_size]; none where the text is over."""
        try:
            mask = grammar.mask_after([*self._output, *path])
        except InvalidRequest as error:
            # The verifier says so to the caller; here it costs the session its guesses.
            log.info("no guess within the grammar: %s", error.reason)
            mask = None
        if mask is None:
            return torch.zeros(self._vocab_size, dtype=torch.bool)
        return allowed_tokens(mask, self._vocab_size)

    def _penalise(self, logits: Tensor, paths: Sequence[Sequence[int]]) -> Tensor:
        """The target's penalties, with the tokens of each row's path counted as output."""
        sampling = self.sampling
        rows = [row for row, path in enumerate(paths) for _ in path]
        tokens = [token_id for path in paths for token_id in path]
        where = torch.tensor([rows, tokens], dtype=torch.int64, device=self._device)
        ones = torch.ones(len(tokens), device=self._device)
        counts = self._counts.repeat(len(paths), 1)
        counts.index_put_((where[0], where[1]), ones, accumulate=True)
        if sampling.repetition_penalty != 1.0:
            seen = self._seen | (counts > 0)
            factor = sampling.repetition_penalty
            penalised = torch.where(logits > 0, logits / factor, logits * factor)
            logits = torch.where(seen, penalised, logits)
        if sampling.presence_penalty != 0.0:
            logits = logits - sampling.presence_penalty * (counts > 0)
        if sampling.frequency_penalty != 0.0:
            logits = logits - sampling.frequency_penalty * counts
        return logits

    def _scaled_noise(self, positions: Sequence[int]) -> Tensor:
        """T * g of each position, float32 [num_rows, vocab_size]; siblings share a position."""
        noise = self._noise.scaled(self.sampling, positions)
        if len(noise) == 1:
            return noise[positions[0]]
        return torch.stack([noise[position] for position in positions])


def rank(z: Tensor, branch: int, spread: float) -> list[Candidates]:
    """The `branch` likeliest tokens of every row with the logarithm of softmax(z / spread).

    Args:
        z: forecasts, float32 [num_rows, vocab_size].
        branch: tokens wanted; fewer come when the vocabulary is smaller.
        spread: scale s of the difference between the models' logits; the smaller, the surer.
    """
    return read_candidates(rank_tokens(z, branch, spread).cpu())


def read_candidates(found: Tensor) -> list[Candidates]:
    """Candidates of every row of what `rank_tokens` found, from the host's memory."""
    tokens, scores = found.tolist()
    return [
        Candidates([int(token) for token in row], log_scores)
        for row, log_scores in zip(tokens, scores, strict=True)
    ]


def cut(logits: Tensor, cuts: Cuts) -> Tensor:
    """top-k, top-p and min-p at the target's temperature; cut tokens become -inf.

    Args:
        logits: float32 [num_rows, vocab_size]; not changed.
        cuts: how far.
    """
    found, short = cut_by_best(logits, cuts, _TOP_P_TOKENS)
    if short is None or not bool(short.any()):
        return found
    # Row by row, so that a row's law does not depend on its neighbours'.
    return torch.where(short, cut_by_best(logits, cuts, logits.shape[1])[0], found)


def cut_by_best(logits: Tensor, cuts: Cuts, num_tokens: int) -> tuple[Tensor, Tensor | None]:
    """As `cut`, looking for top-p among the best tokens alone, so that nobody waits for a device.

    Returns:
        The logits, and for which rows `num_tokens` held too little, bool [num_rows, 1]: they are
        cut too far. None where none can be.
    """
    short = None
    if 0 < cuts.top_k < logits.shape[1]:
        smallest = torch.topk(logits, cuts.top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -math.inf)
    if cuts.top_p < 1.0:
        logits, short = _cut_top_p(logits, cuts, min(num_tokens, logits.shape[1]))
    if cuts.min_p > 0.0:
        least = logits.amax(1, keepdim=True) + cuts.temperature * math.log(cuts.min_p)
        logits = logits.masked_fill(logits < least, -math.inf)
    return logits, short


def _cut_top_p(logits: Tensor, cuts: Cuts, num_tokens: int) -> tuple[Tensor, Tensor | None]:
    """The smallest prefix of the descending sort whose mass reaches top-p, and its ties."""
    probabilities = (logits / cuts.temperature).softmax(1)
    every = num_tokens == logits.shape[1]
    if every:
        best = probabilities.sort(1, descending=True).values
    else:
        best = torch.topk(probabilities, num_tokens, dim=1).values
    mass = best.cumsum(1)
    kept = mass - best < cuts.top_p
    kept[:, :1].fill_(True)
    smallest = best.masked_fill(~kept, math.inf).amin(1, keepdim=True)
    logits = logits.masked_fill(probabilities < smallest, -math.inf)
    return logits, None if every else mass[:, -1:] < cuts.top_p
