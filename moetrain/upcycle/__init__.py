"""Making one mixture-of-experts model of others: dense ones, or mixtures to grow or to shrink. A method is a file."""
