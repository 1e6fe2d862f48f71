"""Features -> sums -> ids -> threshold, and the splits of texts behind them."""
