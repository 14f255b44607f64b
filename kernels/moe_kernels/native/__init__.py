"""The compiled CPU path: ``products.cpp``, built on first use where there is a compiler."""
