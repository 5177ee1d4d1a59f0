"""`tnt reproduce table3`: the rows of the paper's table 3 and its baselines, trained side by side and compared."""
