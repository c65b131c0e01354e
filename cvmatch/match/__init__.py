"""(G, A, S) and C -> scores: towers, fusion heads, loss, training and embedding."""
