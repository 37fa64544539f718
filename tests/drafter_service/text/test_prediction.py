"""Where text knows nothing, the noise still tells which common tokens are about to win."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from drafter_service.guesser import Stated
from drafter_service.text.guessers import TextDrafting, TextResources
from drafter_service.text.prediction import CommonTokens, beside
from easyspec.datastore.corpus import SEPARATOR
from easyspec.datastore.ngram_table import NgramTable, build_ngram_table
from easyspec.speculation.host_noise import HostNoise
from easyspec.speculation.parameters import SamplingParameters
from easyspec.speculation.sources import DraftSources

FINGERPRINT = "f" * 64
SAMPLED = SamplingParameters(seed=3, temperature=0.8)
NGRAM = DraftSources.NGRAM


@pytest.fixture
def resources(tmp_path: Path) -> TextResources:
    """The n-grams of a text of independent tokens: what precedes tells nothing."""
    rng = np.random.default_rng(0)
    text = np.append(rng.zipf(1.3, 20_000) % 500, SEPARATOR).astype(np.uint32)
    build_ngram_table(text, tmp_path / "table", FINGERPRINT)
    return TextResources(prior=NgramTable(tmp_path / "table", FINGERPRINT))


def test_the_best_by_share_and_noise_are_favoured() -> None:
    shares = np.array([0.5, 0.2, 0.1, 0.05, 0.05, 0.03, 0.03, 0.02, 0.01, 0.01])
    tokens = CommonTokens(np.arange(100, 110), shares)
    for position in range(20):
        noise = HostNoise(7).at(position)
        ranked = sorted(range(10), key=lambda index: -(np.log(shares[index]) / 0.8 + noise(100 + index)))
        favoured = tokens.favoured(0.8, noise)
        assert favoured == {100 + index: shares[index] for index in ranked[: len(favoured)]}
        assert len(favoured) == 6
    assert len(CommonTokens(np.arange(2), np.array([0.6, 0.4])).favoured(0.8, HostNoise(7).at(0))) == 2


def test_they_stand_beside_what_text_says() -> None:
    tokens = CommonTokens(np.array([1, 2]), np.array([0.6, 0.4]))
    favoured = tokens.favoured(1.0, HostNoise(7).at(1))
    assert beside(None, favoured) == Stated({1: 0.6, 2: 0.4}, 0)
    said = beside(Stated({1: 0.2, 3: 0.1}, 4), favoured)
    assert said.evidence == 4
    assert said.probabilities == pytest.approx({1: 0.2 + 0.7 * 0.6, 2: 0.7 * 0.4, 3: 0.1})


def test_a_sampled_choice_is_guessed_where_text_knows_nothing(resources: TextResources) -> None:
    """The verifier samples from the tokens' own shares, whatever stands before."""
    assert resources.common_tokens is not None
    token_ids, shares = resources.prior.commonest(500) if resources.prior is not None else ((), ())
    num_named = 0
    for length in range(1, 101):
        prompt = [*range(600, 600 + length)]  # nobody has seen these
        (guesser,) = TextDrafting(resources, NGRAM, SAMPLED, prompt).guessers()
        stated = guesser.state(guesser.root(), 1)
        assert stated is not None
        noise = HostNoise(SAMPLED.seed).at(len(prompt)).of(np.asarray(token_ids))
        chosen = int(token_ids[np.argmax(np.log(shares) / SAMPLED.temperature + noise)])
        num_named += chosen in stated.probabilities
    assert num_named == 100


@pytest.mark.parametrize(
    ("sampling", "sources"),
    [(SamplingParameters(seed=3, temperature=0.0), NGRAM), (SAMPLED, NGRAM | DraftSources.MODEL)],
    ids=["greedy", "beside a model"],
)
def test_where_there_is_no_noise_or_a_model_only_text_speaks(
    resources: TextResources, sampling: SamplingParameters, sources: DraftSources
) -> None:
    (guesser,) = TextDrafting(resources, sources, sampling, [600, 601, 602]).guessers()
    assert guesser.state(guesser.root(), 1) is None
