import pytest

from cvmatch.report.scores import collect_scores


def test_collect_scores_recalls_know_their_chance():
    rows = collect_scores(
        {
            "gallery": 400,
            "G": {"recall@1": 0.2, "recall@5": 0.3, "recall@1%": 0.25, "median_rank": 9.0},
            "small": {"gallery": 10, "recall@5": 0.9},
            "ten": {"top1": 0.5},
        }
    )
    chance = {(row.group, row.name): row.chance for row in rows}
    assert chance == {
        ("G", "recall@1"): 1 / 400,
        ("G", "recall@5"): 5 / 400,
        ("G", "recall@1%"): 4 / 400,
        ("G", "median_rank"): 200.5,
        ("small", "recall@5"): 0.5,
        ("ten", "top1"): 0.1,
    }
    meanings = {row.name: row.meaning for row in rows if row.group == "G"}
    assert meanings["recall@1"] == "the right tile comes first of 400"
    assert meanings["recall@1%"] == "the right tile comes among the first 4 of 400"


@pytest.mark.parametrize("ends", [{"miou_low": 0.3, "miou_high": 0.5}, {"miou_95": [0.3, 0.5]}])
def test_collect_scores_neighbouring_keys_belong_to_one_row(ends):
    (row,) = collect_scores({"g": {"miou": 0.4, "miou_chance": 0.1, "note": "x", **ends}})
    assert (row.value, row.interval, row.chance, row.share) == (0.4, (0.3, 0.5), 0.1, True)


def test_collect_scores_tiles_nearby_are_guessed_among_themselves():
    tree = {"gallery": 900, "near_recall@1": 0.5, "near_gallery": 51.0, "near_queries": 2}
    (row,) = collect_scores(tree | {"near_recall@1_chance": 0.255})
    assert (row.chance, row.share) == (0.255, True)
    assert row.meaning == "it comes first of the tiles nearby (51.0 on average)"
    (row,) = collect_scores(
        tree
    )  # the mean of their numbers says nothing of a guess: 0.02 for 2 and 100
    assert row.chance is None


def test_collect_scores_recalls_by_other_views_than_luminance_are_recalls():
    tree = {"gallery": 40.0}
    for view in ("chroma", "gradient"):
        tree |= {f"{view}/gallery": 40.0, f"{view}/recall@1": 0.3, f"{view}/recall@1_k": 1.0}
        tree |= {f"{view}/recall@1_low": 0.2, f"{view}/recall@1_high": 0.4}
        tree |= {f"{view}/recall@10%": 0.5, f"{view}/recall@10%_k": 4.0}
    rows = collect_scores(tree)
    assert [(row.name, row.chance) for row in rows] == [
        ("chroma/recall@1", 1 / 40),
        ("chroma/recall@10%", 0.1),
        ("gradient/recall@1", 1 / 40),
        ("gradient/recall@10%", 0.1),
    ]
    assert all(row.share for row in rows)
    assert rows[0].interval == (0.2, 0.4)
    assert rows[1].meaning == "by colour alone, the right tile comes among the first 4 of 40"
    assert rows[2].meaning == "by edges alone, the right tile comes first of 40"


def test_collect_scores_of_a_shortlist_are_not_those_of_one_of_ten():
    tree = {"one_of_ten_top1": 0.9, "index": {"recall": {"top1": 1.0, "shortlist": 50}}}
    ten, held, size = collect_scores({"gallery": 320, **tree})
    assert (ten.chance, held.chance, held.share) == (0.1, None, True)
    assert "shortlist holds" in held.meaning
    assert "10" in ten.meaning
    assert size.meaning == "tiles that the first stage hands to the second"


def test_collect_scores_levels_of_an_ablation_are_recalls_of_the_first_place():
    rows = collect_scores({"gallery": 50, "ablation": {"G": 0.5, "G+A": 0.6}})
    assert [(row.name, row.chance, row.share) for row in rows] == [
        ("G", 0.02, True),
        ("G+A", 0.02, True),
    ]


def test_collect_scores_groups_stay_together_below_their_parents():
    tree = {"a": {"psnr": 1.0}, "ncc": 0.2, "b": {"c": {"psnr": 2.0}, "ssim": 0.1}, "none": None}
    assert [(row.group, row.name) for row in collect_scores(tree)] == [
        ("", "ncc"),
        ("a", "psnr"),
        ("b", "ssim"),
        ("b / c", "psnr"),
    ]


def test_collect_scores_shuffled_values_and_classes_get_rows_with_words():
    rows = collect_scores({"ncc": 0.4, "ncc_shuffled": 0.0, "iou": {"tree": 0.5}})
    assert [row.name for row in rows] == ["ncc", "ncc_shuffled", "tree"]
    assert all(row.meaning for row in rows)
    assert [row.share for row in rows] == [False, False, True]


def test_collect_scores_unknown_gallery_gives_no_chance():
    (row,) = collect_scores({"recall@1": 0.4})
    assert row.chance is None
    assert row.group == ""
