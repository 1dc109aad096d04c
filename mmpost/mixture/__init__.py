"""In which proportions to mix data sources, decided from a few short runs instead of one long one.

A design names mixtures, every mixture is trained briefly and scored on held-out tasks, a predictor is fitted to
the scores, and the best of what it predicts is written as weights of ``data.train``.

Source: MoDoMoDo, arXiv 2505.24871. Differs: candidates come from a Gaussian process with expected improvement
instead of the top of a quadratic surface, because the latter is chosen by its own errors.
"""

# Models of ``mmpost mixture fit``; ``mmpost.mixture.predict`` holds them.
MODELS = ("mean", "linear", "quadratic", "gp")
SCHEMES = ("singles", "leave-one-out", "uniform", "seeds", "simplex", "dirichlet", "heuristics")
