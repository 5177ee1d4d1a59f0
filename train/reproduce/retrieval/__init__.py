"""`tnt reproduce retrieval`: memories, attention and Titans' mixtures of both, trained to find values again."""
