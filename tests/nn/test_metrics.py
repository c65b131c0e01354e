"""Numbers of the protocols, against answers that a person can work out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cvmatch.data.schema import IGNORE
from cvmatch.nn import metrics

NAN = float("nan")


def test_ranks_distinct_scores_count_the_better_items():
    score = torch.tensor([[0.9, 0.5, 0.1], [0.9, 0.5, 0.1]])
    assert metrics.ranks(score, torch.tensor([0, 2])).tolist() == [0, 2]


def test_ranks_tied_scores_count_against_the_query():
    score = torch.tensor([[0.9, 0.9, 0.1], [0.5, 0.5, 0.5]])
    assert metrics.ranks(score, torch.tensor([0, 1])).tolist() == [1, 2]


def test_ranks_nan_scores_count_against_the_query():
    score = torch.tensor([[NAN, 0.9, 0.1], [0.9, NAN, 0.1], [NAN, NAN, NAN]])
    assert metrics.ranks(score, torch.tensor([0, 0, 1])).tolist() == [2, 1, 2]


def test_ranks_infinite_scores_are_ordered():
    score = torch.tensor([[math.inf, 1.0], [-math.inf, 1.0]])
    assert metrics.ranks(score, torch.tensor([0, 0])).tolist() == [0, 1]


def test_ranks_truth_outside_the_gallery_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 3\).*got 1 to 3"):
        metrics.ranks(torch.zeros(2, 3), torch.tensor([1, 3]))


def test_recall_constant_embedding_is_never_above_chance():
    embedding = torch.ones(200, 32)  # products of small integers: ties are exact everywhere
    rank = metrics.ranks(embedding @ embedding.T, torch.arange(200))
    assert metrics.recall_at([1, 10], rank) == {"recall@1": 0.0, "recall@10": 0.0}
    assert metrics.median_rank(rank) == 200


def test_recall_at_hand_ranks_gives_the_share_within_k():
    rank = torch.tensor([0, 1, 4, 5])
    assert metrics.recall_at([1, 5, 6], rank) == {
        "recall@1": 0.25,
        "recall@5": 0.75,
        "recall@6": 1.0,
    }


@pytest.mark.parametrize(
    ("share", "gallery", "k"),
    [(0.01, 8884, 88), (0.01, 2215, 22), (0.01, 50, 1), (0.29, 100, 29), (1.0, 7, 7)],
)
def test_recall_share_reports_its_k(share: float, gallery: int, k: int):
    rank = torch.tensor([k - 1, k])  # the last that counts, and the first that does not
    assert metrics.recall_share(share, rank, gallery) == (0.5, k)


def test_median_rank_is_one_based_and_averages_the_middle():
    assert metrics.median_rank(torch.tensor([0, 0, 7])) == 1
    assert metrics.median_rank(torch.tensor([0, 2, 5, 90])) == 4.5


def test_one_of_ten_perfect_scores_give_one():
    assert metrics.one_of_ten(torch.eye(30), torch.arange(30)) == {"top1": 1.0, "top5": 1.0}


def test_one_of_ten_constant_scores_give_zero():
    assert metrics.one_of_ten(torch.ones(30, 30), torch.arange(30)) == {"top1": 0.0, "top5": 0.0}


def test_one_of_ten_random_scores_are_at_chance():
    score = torch.rand(4000, 60, generator=torch.Generator().manual_seed(1))
    found = metrics.one_of_ten(score, torch.arange(4000) % 60)
    # Five standard deviations of a binomial of 4,000: 5 * sqrt(p (1 - p) / 4000).
    assert found["top1"] == pytest.approx(0.1, abs=0.024)
    assert found["top5"] == pytest.approx(0.5, abs=0.040)


def test_one_of_ten_whole_gallery_drawn_equals_recall():
    score = torch.rand(50, 10, generator=torch.Generator().manual_seed(2))
    truth = torch.arange(50) % 10
    recall = metrics.recall_at([1, 5], metrics.ranks(score, truth))
    assert list(metrics.one_of_ten(score, truth).values()) == list(recall.values())


def test_one_of_ten_other_seed_draws_other_candidates():
    score = torch.rand(300, 300, generator=torch.Generator().manual_seed(3))
    first, again, other = (metrics.one_of_ten(score, torch.arange(300), seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_one_of_ten_small_gallery_is_refused():
    with pytest.raises(ValueError, match="at least 10 items, got 9"):
        metrics.one_of_ten(torch.zeros(1, 9), torch.tensor([0]))


def test_bootstrap_coin_interval_is_that_of_the_binomial():
    low, high = metrics.bootstrap(torch.tensor([0.0, 1.0] * 200))
    # The mean of 400 fair coins: 0.5 +- 1.96 * 0.5 / 20.
    assert low == pytest.approx(0.451, abs=0.006)
    assert high == pytest.approx(0.549, abs=0.006)


def test_bootstrap_constant_values_have_no_width():
    assert metrics.bootstrap(torch.full((20,), 0.25)) == (0.25, 0.25)


def test_bootstrap_no_values_is_nan():
    assert all(math.isnan(bound) for bound in metrics.bootstrap(torch.empty(0)))


def test_confusion_hand_map_has_truth_in_rows():
    truth = torch.tensor([[0, 0, 1], [2, IGNORE, 1]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 1, 1], [0, 2, 1]], dtype=torch.uint8)
    assert metrics.confusion(predicted, truth, 3).tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]


def test_confusion_id_beyond_the_classes_is_refused():
    with pytest.raises(ValueError, match=r"true class ids in \[0, 5\), got 0 to 5"):
        metrics.confusion(torch.tensor([0, 0]), torch.tensor([0, 5]), 5)
    with pytest.raises(ValueError, match=r"predicted class ids in \[0, 5\), got 0 to 255"):
        metrics.confusion(torch.tensor([0, 255]), torch.tensor([0, 1]), 5)


def test_miou_hand_confusion_averages_the_classes_that_occur():
    mean, per_class = metrics.miou(torch.tensor([[3, 1, 0], [1, 1, 0], [0, 0, 0]]))
    assert per_class[:2] == pytest.approx([3 / 5, 1 / 3])
    assert math.isnan(per_class[2])
    assert mean == pytest.approx((3 / 5 + 1 / 3) / 2)


def test_miou_class_only_predicted_counts_as_zero():
    mean, per_class = metrics.miou(torch.tensor([[1, 1], [0, 0]]))
    assert per_class == [0.5, 0.0]
    assert mean == 0.25


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 2), min_size=2, max_size=40), st.integers(0, 2**31))
def test_miou_split_over_workers_adds_up(truth: list[int], seed: int):
    true = torch.tensor(truth)
    guess = torch.randint(3, true.shape, generator=torch.Generator().manual_seed(seed))
    whole = metrics.miou(metrics.confusion(guess, true, 3))
    cut = len(truth) // 3 + 1
    parts = [(guess[:cut], true[:cut]), (guess[cut:], true[cut:])]
    # What the training loop gives: the row-weighted mean of each worker's counts a row.
    counts = torch.stack([metrics.confusion(*part, 3).double() / len(part[0]) for part in parts])
    rows = torch.tensor([len(part[0]) for part in parts]).double()
    mean = (counts * rows[:, None, None]).sum(0) / rows.sum()
    again = metrics.miou(mean)
    assert again[0] == pytest.approx(whole[0])
    assert again[1] == pytest.approx(whole[1], nan_ok=True)


def test_psnr_constant_error_is_twenty_decibel():
    true = torch.full((1, 3, 16, 16), 0.5)
    assert metrics.psnr(true + 0.1, true).item() == pytest.approx(20.0, abs=1e-3)
    assert metrics.psnr(true, true).item() == math.inf


def test_ssim_flat_pictures_follow_the_luminance_term():
    a, b = 0.2, 0.6
    flat = torch.ones(1, 3, 16, 16)
    expected = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
    assert metrics.ssim(a * flat, b * flat).item() == pytest.approx(expected, abs=1e-4)


def test_ssim_equal_pictures_are_one_and_inverted_ones_negative():
    true = torch.rand(2, 3, 24, 20, generator=torch.Generator().manual_seed(4))
    assert metrics.ssim(true, true).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    assert (metrics.ssim(1 - true, true) < -0.5).all()


def test_ssim_picture_below_the_window_is_refused():
    with pytest.raises(ValueError, match="at least 11"):
        metrics.ssim(torch.zeros(1, 3, 10, 16), torch.zeros(1, 3, 10, 16))


def test_ncc_ignores_brightness_and_contrast_and_knows_the_sign():
    true = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    assert metrics.ncc(0.3 * true + 0.2, true).item() == pytest.approx(1.0, abs=1e-5)
    assert metrics.ncc(1 - true, true).item() == pytest.approx(-1.0, abs=1e-5)


def test_ncc_hand_picture_is_the_correlation():
    first = torch.tensor([0.0, 1.0, 0.0, 1.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    second = torch.tensor([0.0, 1.0, 0.0, 0.0]).reshape(1, 1, 2, 2).expand(1, 3, 2, 2)
    # Covariance 1/8 over the standard deviations 1/2 and sqrt(3)/4.
    assert metrics.ncc(first, second).item() == pytest.approx(1 / math.sqrt(3), abs=1e-5)


def test_ncc_flat_picture_is_zero():
    true = torch.rand(1, 3, 8, 8)
    assert metrics.ncc(torch.full((1, 3, 8, 8), 0.3), true).item() == 0.0


def noise(rows: int, size: int, seed: int) -> torch.Tensor:
    return torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("view", ["luminance", "chroma", "gradient"])
def test_retrieval_by_ncc_faithful_pictures_find_their_own(view: metrics.Channel):
    true = noise(20, 64, 6)
    found = metrics.planes(0.5 * true + 0.1, view)  # paler and brighter
    score = metrics.retrieval_by_ncc(found, metrics.planes(true, view))
    assert metrics.ranks(score, torch.arange(20)).tolist() == [0] * 20


def test_retrieval_by_ncc_flat_pictures_rank_last():
    true = noise(20, 64, 7)
    flat = metrics.planes(torch.full_like(true, 0.4))
    score = metrics.retrieval_by_ncc(flat, metrics.planes(true))
    assert metrics.ranks(score, torch.arange(20)).tolist() == [19] * 20


def test_retrieval_by_ncc_at_full_size_has_ncc_on_its_diagonal():
    predicted, true = noise(5, 16, 8), noise(5, 16, 9)
    score = metrics.retrieval_by_ncc(metrics.planes(predicted), metrics.planes(true))
    assert score.diagonal().tolist() == pytest.approx(metrics.ncc(predicted, true).tolist())


def test_planes_of_grey_pictures_have_no_chroma_and_of_flat_ones_no_gradient():
    grey = noise(1, 8, 0)[:, :1].expand(-1, 3, -1, -1)
    assert metrics.planes(grey, "chroma", 8).abs().max() < 1e-6
    assert metrics.planes(torch.full((1, 3, 8, 8), 0.7), "gradient", 8).abs().max() < 1e-6
    ramp = torch.arange(8.0).expand(1, 3, 8, 8) / 10  # 0.1 a column
    inner = metrics.planes(ramp, "gradient", 8)[..., 1:-1]
    torch.testing.assert_close(inner, torch.full((1, 1, 8, 6), 0.1))


def test_planes_of_one_view_do_not_see_what_another_compares():
    red, cyan = (torch.tensor(c).view(1, 3, 1, 1) for c in ([0.5, 0.1, 0.1], [0.1, 0.3, 0.3]))
    half = torch.zeros(1, 1, 8, 8)
    half[..., 4:] = 1
    one, other = half * red + (1 - half) * cyan, half * cyan + (1 - half) * red
    chroma = metrics.retrieval_by_ncc(
        metrics.planes(one, "chroma", 8), metrics.planes(other, "chroma", 8)
    )
    gradient = metrics.retrieval_by_ncc(
        metrics.planes(one, "gradient", 8), metrics.planes(other, "gradient", 8)
    )
    assert chroma.item() == pytest.approx(-1, abs=1e-4)  # the halves have changed colours
    assert gradient.item() == pytest.approx(1, abs=1e-4)  # the edge is where it was


def test_mean_interval_is_students():
    values = [0.1, 0.4, 0.35, 0.9]
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert metrics.mean_interval(values) == pytest.approx(
        (np.mean(values), expected.low, expected.high)
    )
    assert metrics.mean_interval([0.3]).value == 0.3
    assert math.isnan(metrics.mean_interval([0.3]).low)
    assert math.isnan(metrics.mean_interval([0.3, math.nan]).value)
