import pandas as pd

from cvmatch.report.evaluation_page import select_queries


def test_select_queries_are_the_best_the_worst_and_others_each_once():
    rank = [1, 9, 1, 3, 2, 7, 1, 5]
    score = [0.9, 0.1, 0.8, 0.5, 0.6, 0.2, 0.7, 0.3]
    rows = pd.DataFrame({"rank": rank, "score": score})
    best, worst, others = select_queries(rows, shown=2).values()
    assert best == [0, 2]  # of the three first places, those of the highest scores
    assert worst == [1, 5]
    assert len(others) == 2
    assert set(others) < {3, 4, 6, 7}
    few = select_queries(rows.head(3), shown=2)
    assert sorted(position for some in few.values() for position in some) == [0, 1, 2]
